"""The HTTP contract, the assignment's four scenarios first. `make test` runs it, on servers of its own.

With API_URL in the environment it tests a deployment that is already running; what needs SQL is skipped then.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from uuid import uuid4

import httpx
import pytest

from conftest import Database, Nasabah, eventually

UNKNOWN = "9999999999"
TIDAK_DIKENALI = (400, {"remark": "Nomor rekening tidak dikenali."})
TIDAK_CUKUP = (400, {"remark": "Saldo tidak mencukupi."})
PIN_SALAH = (401, {"remark": "Nomor rekening atau PIN salah."})
KUNCI_TERPAKAI = (422, {"remark": "Idempotency-Key sudah dipakai untuk transaksi lain."})


def said(answer: httpx.Response) -> tuple[int, dict[str, object]]:
    return answer.status_code, answer.json()


def saldo(nasabah: Nasabah) -> int:
    """The balance now: over HTTP it is told only with a movement, so deposit one rupiah and take it back."""
    nasabah.tabung(1)
    return int(nasabah.tarik(1).json()["saldo"])


def last_mutasi(database: Database, nasabah: Nasabah) -> tuple[datetime, str, str, int]:
    """The mutation of the newest movement, once it has arrived: the four fields of the assignment."""
    ((newest,),) = database("SELECT max(id) FROM transaksi WHERE no_rekening = %s", nasabah.no_rekening)
    columns = "tanggal_transaksi, no_rekening, jenis_transaksi, nominal"
    row: tuple[datetime, str, str, int]
    (row,) = eventually(lambda: database(f"SELECT {columns} FROM mutasi WHERE id_transaksi = %s", newest))
    return row


@pytest.fixture
def siti(url: str, nasabah: Callable[..., Nasabah]) -> Nasabah:
    """Another customer of the README."""
    return nasabah(url, "2345678901", "234567")


@pytest.fixture
def ani(url: str, database: Database, nasabah: Callable[..., Nasabah]) -> Nasabah:
    """A new customer whose account is empty."""
    return nasabah(url, database.open_account())


@pytest.fixture
def key() -> str:
    """An idempotency key that nobody has used."""
    return str(uuid4())


# ---------------------------------------------------------------- the four scenarios


def test_tabung_nomor_rekening_dikenali(budi: Nasabah) -> None:
    before = saldo(budi)
    assert said(budi.tabung(50_000)) == (200, {"saldo": before + 50_000})


def test_tabung_nomor_rekening_tidak_dikenali(budi: Nasabah) -> None:
    before = saldo(budi)
    assert said(budi.post("/tabung", 50_000, no_rekening=UNKNOWN)) == TIDAK_DIKENALI
    assert saldo(budi) == before


def test_tarik_kurang_dari_saldo(budi: Nasabah) -> None:
    before = saldo(budi)
    assert said(budi.tarik(25_000)) == (200, {"saldo": before - 25_000})


def test_tarik_lebih_dari_saldo(budi: Nasabah) -> None:
    before = saldo(budi)
    assert said(budi.tarik(before + 1)) == TIDAK_CUKUP
    assert saldo(budi) == before


# ---------------------------------------------------------------- every movement becomes a row in `mutasi`


@pytest.mark.parametrize("jenis", ["tabung", "tarik"])
def test_the_movement_is_in_mutasi_with_all_four_fields(budi: Nasabah, database: Database, jenis: str) -> None:
    ((before,),) = database("SELECT clock_timestamp()")
    assert budi.post(f"/{jenis}", 25_000).status_code == 200
    tanggal_transaksi, *fields = last_mutasi(database, budi)
    ((after,),) = database("SELECT clock_timestamp()")
    assert fields == [budi.no_rekening, jenis, 25_000]
    assert before < tanggal_transaksi < after


def test_what_was_refused_is_in_no_book(ani: Nasabah, database: Database) -> None:
    assert said(ani.tarik(1)) == TIDAK_CUKUP
    assert said(ani.post("/tabung", 1, no_rekening=UNKNOWN)) == TIDAK_DIKENALI
    assert database("SELECT id FROM transaksi WHERE no_rekening IN (%s, %s)", ani.no_rekening, UNKNOWN) == []
    assert database.saldo(ani.no_rekening) == 0


# ---------------------------------------------------------------- whose money it is


def test_tarik_nomor_rekening_tidak_dikenali(budi: Nasabah) -> None:
    before = saldo(budi)
    assert said(budi.post("/tarik", 1, no_rekening=UNKNOWN)) == TIDAK_DIKENALI
    assert saldo(budi) == before


@pytest.mark.parametrize("path", ["/tabung", "/tarik"])
def test_the_account_of_another_customer_is_as_unknown_as_one_that_does_not_exist(
    budi: Nasabah, siti: Nasabah, path: str
) -> None:
    before = saldo(siti)
    assert said(budi.post(path, 1, no_rekening=siti.no_rekening)) == TIDAK_DIKENALI
    assert saldo(siti) == before


def test_who_cannot_prove_his_account_is_told_nothing_but_that(url: str, nasabah: Callable[..., Nasabah]) -> None:
    payload = {"no_rekening": "3456789012", "nominal": 1}
    answers = [
        httpx.post(f"{url}/tabung", json=payload),
        nasabah(url, "3456789012", "999999").tabung(1),
        nasabah(url, UNKNOWN).tabung(1),
    ]
    assert [said(answer) for answer in answers] == [PIN_SALAH] * 3
    challenges = {answer.headers["WWW-Authenticate"] for answer in answers}
    assert challenges == {'Basic realm="transaksi", charset="UTF-8"'}
    # So that a deployment's demo account does not lock, however often this runs.
    assert nasabah(url, "3456789012", "345678").tabung(1).status_code == 200


# ---------------------------------------------------------------- to the rupiah


def test_the_whole_balance_may_be_withdrawn_but_not_a_rupiah_more(ani: Nasabah) -> None:
    assert said(ani.tabung(10_000)) == (200, {"saldo": 10_000})
    assert said(ani.tarik(10_001)) == TIDAK_CUKUP
    assert said(ani.tarik(10_000)) == (200, {"saldo": 0})
    assert said(ani.tarik(1)) == TIDAK_CUKUP


def test_sixty_four_at_once_on_one_account_lose_and_make_no_money(ani: Nasabah, database: Database) -> None:
    moves = [("/tabung", 10_000), ("/tarik", 15_000)] * 32
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda move: ani.post(*move), moves))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.request.url.path for answer in refused} <= {"/tarik"}
    assert [said(answer) for answer in refused] == [TIDAK_CUKUP] * len(refused)
    journal = database("SELECT saldo_akhir FROM transaksi WHERE no_rekening = %s", ani.no_rekening)
    told = [answer.json()["saldo"] for answer in answers if answer not in refused]
    assert sorted(told) == sorted(row[0] for row in journal)
    assert database.saldo(ani.no_rekening) == 32 * 10_000 - (len(told) - 32) * 15_000 >= 0
    database.audit()


# ---------------------------------------------------------------- Idempotency-Key


def test_the_same_key_again_gets_the_first_answer_and_moves_nothing(budi: Nasabah, key: str) -> None:
    first = budi.tabung(700, idempotency_key=key)
    assert first.status_code == 200
    assert "Idempotent-Replayed" not in first.headers
    assert budi.tabung(1).status_code == 200  # the balance has changed: what is told again is that of then
    again = budi.tabung(700, idempotency_key=key)
    assert said(again) == said(first)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert saldo(budi) == first.json()["saldo"] + 1


def test_the_same_key_for_another_movement_is_refused(budi: Nasabah, key: str) -> None:
    assert budi.tabung(700, idempotency_key=key).status_code == 200
    before = saldo(budi)
    assert said(budi.tabung(701, idempotency_key=key)) == KUNCI_TERPAKAI
    assert said(budi.tarik(700, idempotency_key=key)) == KUNCI_TERPAKAI
    assert saldo(budi) == before


def test_a_key_is_its_accounts_own(budi: Nasabah, siti: Nasabah, key: str) -> None:
    before = saldo(siti)
    assert budi.tabung(700, idempotency_key=key).status_code == 200
    assert said(siti.tabung(300, idempotency_key=key)) == (200, {"saldo": before + 300})


def test_the_same_key_fifty_times_at_once_moves_money_once(budi: Nasabah, key: str) -> None:
    before = saldo(budi)
    with ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(lambda _: budi.tabung(700, idempotency_key=key), range(50)))
    assert [said(answer) for answer in answers] == [(200, {"saldo": before + 700})] * 50
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 49
    assert saldo(budi) == before + 700


def test_a_key_whose_first_try_was_refused_may_be_tried_again(budi: Nasabah, key: str) -> None:
    before = saldo(budi)
    assert said(budi.tarik(before + 500, idempotency_key=key)) == TIDAK_CUKUP
    budi.tabung(500)
    assert said(budi.tarik(before + 500, idempotency_key=key)) == (200, {"saldo": 0})
    budi.tabung(before)


# ---------------------------------------------------------------- the operator's pages, open to all


def test_health_says_that_it_can_serve(url: str) -> None:
    assert said(httpx.get(f"{url}/health")) == (200, {"status": "ok"})


def test_the_documentation_shows_both_movements(url: str) -> None:
    assert {"/tabung", "/tarik", "/health"} <= httpx.get(f"{url}/openapi.json").json()["paths"].keys()
    assert "text/html" in httpx.get(f"{url}/docs").headers["Content-Type"]
