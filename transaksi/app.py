"""The rules: what a deposit and a withdrawal are, and why one is refused. Pure: no I/O.

Amounts are whole rupiah.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

MAX_NOMINAL = 1_000_000_000_000
MAX_SALDO = 2**53 - 1  # the largest integer that every JSON client reads exactly (RFC 8259, 6)

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
    """A refused request: HTTP status, remark for the customer, headers, reason for the log."""

    status = 400
    remark = ""
    headers: Mapping[str, str] = {}

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class UnknownAccount(Refusal):
    """The account is not the customer's own. Whether it exists makes no difference."""

    remark = "Nomor rekening tidak dikenali."


class InsufficientBalance(Refusal):
    remark = "Saldo tidak mencukupi."


class BalanceLimit(Refusal):
    remark = "Saldo akan melebihi batas."


class KeyReused(Refusal):
    status = 422
    remark = "Idempotency-Key sudah dipakai untuk transaksi lain."


class Unavailable(Refusal):
    """The request was not carried out and will not be: the client may repeat it."""

    status = 503
    remark = "Layanan sedang tidak tersedia, silakan coba lagi."
    headers: Mapping[str, str] = {"Retry-After": "1"}


class Unknown(Refusal):
    """The command may or may not have been carried out."""

    status = 503
    remark = (
        "Hasil transaksi belum dapat dipastikan; ulangi dengan Idempotency-Key yang sama, "
        "atau tanyakan dahulu bila tidak memakainya."
    )


Key = tuple[str, str]  # account, idempotency key
Result = Movement | Replay | Refusal


def decide(
    commands: Sequence[Command], balances: dict[str, int], recorded: dict[Key, Movement]
) -> list[Result]:
    """Decide commands in order of arrival: one result each, as if each had come alone.

    `balances` (by account) and `recorded` (movements already made under a key) are updated in
    place, so that each command sees those before it.
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
            raise KeyReused
        return Replay(first)
    if account not in balances:
        raise UnknownAccount
    balances[account] = balance_after(command, balances[account])
    movement = Movement(command, balances[account])
    if command.idempotency_key:
        recorded[key] = movement
    return movement


def balance_after(command: Command, balance: int) -> int:
    """The balance after one command. Raises `BalanceLimit` or `InsufficientBalance`."""
    if command.jenis_transaksi == "tarik":
        if command.nominal > balance:
            raise InsufficientBalance
        return balance - command.nominal
    if balance + command.nominal > MAX_SALDO:
        raise BalanceLimit
    return balance + command.nominal
