"""The rules: what a deposit and a withdrawal are, and why one is refused. Pure: no I/O.

Amounts are whole rupiah.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

MAX_NOMINAL = 1_000_000_000_000
MAX_SALDO = 2**53 - 1  # the largest integer that every JSON client reads exactly (RFC 8259, section 6)

JenisTransaksi = Literal["tabung", "tarik"]


@dataclass(frozen=True, slots=True)
class Command:
    """A customer's request to deposit or withdraw `nominal` rupiah."""

    jenis_transaksi: JenisTransaksi
    no_rekening: str
    nominal: int
    idempotency_key: str | None = None
    traceparent: str | None = None


@dataclass(slots=True)
class Movement:
    """An accepted command. The journal gives it its id and its time (UTC)."""

    command: Command
    saldo_akhir: int
    id_transaksi: int | None = None
    tanggal_transaksi: datetime | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """A command whose idempotency key has made the movement `first` already: nothing moves."""

    first: Movement


class Refusal(Exception):
    """A refused request: HTTP status, remark for the customer, reason for the log, headers."""

    def __init__(
        self, status: int, remark: str, reason: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(remark)
        self.status, self.remark, self.reason, self.headers = status, remark, reason, headers


def unknown_account() -> Refusal:
    """The account is not the customer's own; whether it exists must make no difference."""
    return Refusal(400, "Nomor rekening tidak dikenali.")


def unavailable(reason: str) -> Refusal:
    """The request was not carried out and will not be: the client may repeat it."""
    remark = "Layanan sedang tidak tersedia, silakan coba lagi."
    return Refusal(503, remark, reason, {"Retry-After": "1"})


def unknown_outcome() -> Refusal:
    """The command may or may not have been carried out."""
    remark = "Hasil transaksi belum dapat dipastikan; ulangi dengan Idempotency-Key yang sama, "
    return Refusal(503, remark + "atau tanyakan dahulu bila tidak memakainya.", "outcome unknown")


Key = tuple[str, str]  # account, idempotency key
Result = Movement | Replay | Refusal


def decide(
    commands: Sequence[Command], balances: dict[str, int], recorded: dict[Key, Movement]
) -> list[Result]:
    """Decide commands in order of arrival: one result each, as if each had come alone.

    `balances` (by account) and `recorded` (movements already made under a key) are updated in place, so
    that each command sees those before it.
    """
    results: list[Result] = []
    for command in commands:
        try:
            results.append(_decide(command, balances, recorded))
        except Refusal as refusal:
            results.append(refusal)
    return results


def _decide(command: Command, balances: dict[str, int], recorded: dict[Key, Movement]) -> Movement | Replay:
    account, key = command.no_rekening, (command.no_rekening, command.idempotency_key or "")
    if first := recorded.get(key):
        before = first.command
        if (before.jenis_transaksi, before.nominal) != (command.jenis_transaksi, command.nominal):
            raise Refusal(422, "Idempotency-Key sudah dipakai untuk transaksi lain.")
        return Replay(first)
    if account not in balances:
        raise unknown_account()
    balances[account] = balance_after(command, balances[account])
    movement = Movement(command, balances[account])
    if command.idempotency_key:
        recorded[key] = movement
    return movement


def balance_after(command: Command, balance: int) -> int:
    """The balance after one command. Raises `Refusal`."""
    if command.jenis_transaksi == "tarik":
        if command.nominal > balance:
            raise Refusal(400, "Saldo tidak mencukupi.")
        return balance - command.nominal
    if balance + command.nominal > MAX_SALDO:
        raise Refusal(400, "Saldo akan melebihi batas.")
    return balance + command.nominal
