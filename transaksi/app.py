"""The rules: what a deposit and a withdrawal are, and who may make one. No I/O.

Amounts are whole rupiah.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

MAX_NOMINAL = 1_000_000_000_000
MAX_SALDO = 2**53 - 1  # the largest integer that every JSON client reads exactly (RFC 8259, section 6)

Jenis = Literal["tabung", "tarik"]


@dataclass(frozen=True, slots=True)
class Perintah:
    """One customer's wish to move `nominal` rupiah."""

    jenis_transaksi: Jenis
    no_rekening: str
    nominal: int
    idempotency_key: str | None = None
    traceparent: str | None = None


@dataclass(slots=True)
class Gerakan:
    """An accepted movement; `id_transaksi` is known once the journal has it."""

    perintah: Perintah
    saldo_akhir: int
    id_transaksi: int | None = None


@dataclass(frozen=True, slots=True)
class Ulangan:
    """A repeat of `pertama` under its idempotency key: answered again, not moved again."""

    pertama: Gerakan


class Ditolak(Exception):
    """A command that was refused; nothing has changed. `remark` is for the customer."""

    remark: ClassVar[str]


class RekeningTidakDikenali(Ditolak):
    remark = "Nomor rekening tidak dikenali."


class SaldoTidakCukup(Ditolak):
    remark = "Saldo tidak mencukupi."


class SaldoMelebihiBatas(Ditolak):
    remark = "Saldo akan melebihi batas."


class KunciSudahDipakai(Ditolak):
    remark = "Idempotency-Key sudah dipakai untuk transaksi lain."


class Unavailable(Exception):
    """The command was not carried out and will not be: it may be sent again at once."""


class Unknown(Exception):
    """The command may or may not have moved the money."""


Kunci = tuple[str, str]  # account, idempotency key
Hasil = Gerakan | Ulangan | Ditolak


def authorize(nasabah: str, no_rekening: str) -> None:
    """A customer may move his own money only.

    Somebody else's account and one that does not exist are refused alike, so that nobody can learn which exist.
    """
    if no_rekening != nasabah:
        raise RekeningTidakDikenali


def saldo_after(perintah: Perintah, saldo: int) -> int:
    """The balance after one command; raises `Ditolak` where the rules forbid it."""
    if perintah.jenis_transaksi == "tabung":
        if saldo + perintah.nominal > MAX_SALDO:
            raise SaldoMelebihiBatas
        return saldo + perintah.nominal
    if perintah.nominal > saldo:
        raise SaldoTidakCukup
    return saldo - perintah.nominal


def decide(antrean: Iterable[Perintah], saldo: dict[str, int], tercatat: dict[Kunci, Gerakan]) -> list[Hasil]:
    """Decide commands in their order of arrival: one result each, as if each had come alone.

    `saldo` (by account) and `tercatat` (movements already made under a key) are what the commands find, and are
    brought up to date, so that each command sees those before it.
    """
    hasil: list[Hasil] = []
    for perintah in antrean:
        try:
            hasil.append(_decide(perintah, saldo, tercatat))
        except Ditolak as ditolak:
            hasil.append(ditolak)
    return hasil


def _decide(perintah: Perintah, saldo: dict[str, int], tercatat: dict[Kunci, Gerakan]) -> Gerakan | Ulangan:
    no_rekening, key = perintah.no_rekening, perintah.idempotency_key
    if key is not None and (pertama := tercatat.get((no_rekening, key))):
        dulu = pertama.perintah
        if (dulu.jenis_transaksi, dulu.nominal) != (perintah.jenis_transaksi, perintah.nominal):
            raise KunciSudahDipakai
        return Ulangan(pertama)
    if no_rekening not in saldo:
        raise RekeningTidakDikenali
    saldo[no_rekening] = saldo_after(perintah, saldo[no_rekening])
    gerakan = Gerakan(perintah, saldo[no_rekening])
    if key is not None:
        tercatat[no_rekening, key] = gerakan
    return gerakan
