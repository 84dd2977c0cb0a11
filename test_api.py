"""The HTTP contract, the assignment's four scenarios first. `make test` runs it, on servers of its own.

With API_URL in the environment it tests a deployment that is already running; what needs SQL is skipped then.
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from conftest import Database, Nasabah, eventually

UNKNOWN = "9999999999"


def saldo(nasabah: Nasabah) -> int:
    """The balance now: over HTTP it is told only with a movement, so deposit one rupiah and take it back."""
    nasabah.tabung(1)
    return nasabah.tarik(1).json()["saldo"]


def last_mutasi(database: Database, nasabah: Nasabah) -> tuple:
    """The newest row of the mutation book, once it has caught up with the journal."""
    (newest,) = database("SELECT max(id) FROM transaksi WHERE no_rekening = %s", nasabah.no_rekening)
    query = (
        "SELECT no_rekening, jenis_transaksi, nominal, tanggal_transaksi FROM mutasi WHERE id_transaksi = %s"
    )
    return eventually(lambda: database(query, newest[0]))[0]


# ---------------------------------------------------------------- the four scenarios


def test_tabung_nomor_rekening_dikenali(budi: Nasabah) -> None:
    before = saldo(budi)
    answer = budi.tabung(50_000)
    assert (answer.status_code, answer.json()) == (200, {"saldo": before + 50_000})


def test_tabung_nomor_rekening_tidak_dikenali(budi: Nasabah) -> None:
    before = saldo(budi)
    answer = budi.post("/tabung", 50_000, no_rekening=UNKNOWN)
    assert (answer.status_code, answer.json()) == (400, {"remark": "Nomor rekening tidak dikenali."})
    assert saldo(budi) == before


def test_tarik_kurang_dari_saldo(budi: Nasabah) -> None:
    before = saldo(budi)
    answer = budi.tarik(25_000)
    assert (answer.status_code, answer.json()) == (200, {"saldo": before - 25_000})


def test_tarik_lebih_dari_saldo(budi: Nasabah) -> None:
    before = saldo(budi)
    answer = budi.tarik(before + 1)
    assert (answer.status_code, answer.json()) == (400, {"remark": "Saldo tidak mencukupi."})
    assert saldo(budi) == before
