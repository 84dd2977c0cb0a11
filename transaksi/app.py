"""The rules: what a deposit and a withdrawal are, and why one is refused. Pure: no I/O.

Amounts are whole rupiah.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

MAX_NOMINAL = 1_000_000_000_000
MAX_SALDO = 2**53 - 1  # the largest integer that every JSON client reads exactly (RFC 8259, section 6)

JenisTransaksi = Literal["tabung", "tarik"]


@dataclass(slots=True)
class Movement:
    """A deposit or withdrawal of `nominal` rupiah.

    Once it is accepted it has the balance after it, and from the journal an id and a time (UTC).
    """

    jenis_transaksi: JenisTransaksi
    no_rekening: str
    nominal: int
    idempotency_key: str | None = None
    traceparent: str | None = None
    saldo_akhir: int | None = None
    id: int | None = None
    tanggal_transaksi: datetime | None = None


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


Key = tuple[str, str | None]  # account, idempotency key
Result = Movement | Refusal


def decide(movement: Movement, balances: dict[str, int], made: dict[Key, Movement]) -> Result:
    """Decide the next movement of a batch: itself if accepted, the one that its key made before, a refusal.

    Only an accepted one moves money. `balances` (by account) and `made` (by key) are updated for the next.
    """
    account, nominal, key = movement.no_rekening, movement.nominal, movement.idempotency_key
    if first := made.get((account, key)):
        same = (first.jenis_transaksi, first.nominal) == (movement.jenis_transaksi, nominal)
        return first if same else Refusal("key_reused")
    if account not in balances:
        return Refusal("unknown_account")
    balance = balances[account] + (nominal if movement.jenis_transaksi == "tabung" else -nominal)
    if not 0 <= balance <= MAX_SALDO:
        return Refusal("insufficient_balance" if balance < 0 else "balance_limit")
    movement.saldo_akhir = balances[account] = balance
    if key:
        made[account, key] = movement
    return movement
