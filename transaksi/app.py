"""The rules: what a deposit and a withdrawal are, and why one is refused. Pure: no I/O.

Amounts are whole rupiah.
"""

from collections.abc import Mapping, Sequence
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
    """A repeated command: its idempotency key has made the movement `first` already. Nothing moves."""

    first: Movement


REFUSALS = {  # HTTP status, and the remark for the customer
    "not_json": (400, "Payload bukan JSON yang sah."),
    "no_rekening": (400, "no_rekening harus teks berisi 10 sampai 16 angka."),
    "nominal": (400, "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah."),
    "Idempotency-Key": (400, "Idempotency-Key harus 1 sampai 255 karakter ASCII yang tercetak."),
    "sebelum": (400, "sebelum harus bilangan bulat positif, paling banyak 18 angka."),
    "batas": (400, "batas harus bilangan bulat 1 sampai 100."),
    # not the customer's own, whether it exists or not
    "unknown_account": (400, "Nomor rekening tidak dikenali."),
    "insufficient_balance": (400, "Saldo tidak mencukupi."),
    "balance_limit": (400, "Saldo akan melebihi batas."),
    "not_authenticated": (401, "Nomor rekening atau PIN salah."),
    "404": (404, "Alamat tidak dikenali."),
    "405": (405, "Metode tidak diizinkan untuk alamat ini."),
    "payload_late": (408, "Payload tidak diterima lengkap pada waktunya."),
    "payload_large": (413, "Payload melebihi 4 KiB."),
    "content_type": (415, "Content-Type harus application/json."),
    "key_reused": (422, "Idempotency-Key sudah dipakai untuk transaksi lain."),
    "unexpected": (500, "Terjadi kesalahan pada layanan."),
    # not carried out: may be repeated
    "unavailable": (503, "Layanan sedang tidak tersedia, silakan coba lagi."),
    # may or may not have been carried out
    "unknown_outcome": (503, "Hasil belum pasti: ulangi dengan Idempotency-Key yang sama, atau cek mutasi."),
}
HEADERS = {
    "not_authenticated": {"WWW-Authenticate": 'Basic realm="transaksi", charset="UTF-8"'},  # RFC 7617
    "unavailable": {"Retry-After": "1"},
}


class Refusal(Exception):
    """A refused request: a name in `REFUSALS`, and a reason for the log."""

    def __init__(self, name: str, reason: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(name)
        self.status, self.remark = REFUSALS[name]
        self.headers = headers or HEADERS.get(name)
        self.reason = reason or name


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
            raise Refusal("key_reused")
        return Replay(first)
    if account not in balances:
        raise Refusal("unknown_account")
    balances[account] = balance_after(command, balances[account])
    movement = Movement(command, balances[account])
    if command.idempotency_key:
        recorded[key] = movement
    return movement


def balance_after(command: Command, balance: int) -> int:
    """The balance after one command. Raises `Refusal`."""
    if command.jenis_transaksi == "tarik":
        if command.nominal > balance:
            raise Refusal("insufficient_balance")
        return balance - command.nominal
    if balance + command.nominal > MAX_SALDO:
        raise Refusal("balance_limit")
    return balance + command.nominal
