"""The reviewer's file: the assignment's four scenarios, then the essentials of the HTTP contract.

`make test` runs it on servers of its own. With pytest and httpx alone, for a
running deployment: `API_URL=http://127.0.0.1:8000 pytest test_api.py`
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise, product
from random import randint
from typing import Any
from uuid import uuid4

import httpx
import pytest

from conftest import API_URL, Customer, eventually

NO_SUCH_ACCOUNT = "9999999999"
UNKNOWN_ACCOUNT = (400, {"remark": "Nomor rekening tidak dikenali."})
INSUFFICIENT_BALANCE = (400, {"remark": "Saldo tidak mencukupi."})
NOT_AUTHENTICATED = (401, {"remark": "Nomor rekening atau PIN salah."})
KEY_REUSED = (422, {"remark": "Idempotency-Key sudah dipakai untuk transaksi lain."})


def answer(response: httpx.Response) -> tuple[int, Any]:
    return response.status_code, response.json()


def statement(customer: Customer, **query: int) -> dict[str, Any]:
    page: dict[str, Any] = customer.client.get("/mutasi", params=query).raise_for_status().json()
    return page


def arrived(customer: Customer, told: list[int]) -> list[dict[str, Any]]:
    """The newest entries of the statement, once they are those that led to these balances."""

    def booked() -> list[dict[str, Any]]:
        newest: list[dict[str, Any]] = statement(customer, batas=100)["mutasi"][: len(told)]
        return newest if sorted(entry["saldo_akhir"] for entry in newest) == sorted(told) else []

    return list(eventually(booked))


@pytest.fixture
def siti(url: str, customer: Callable[..., Customer]) -> Customer:
    return customer(url, "2345678901", "234567")


@pytest.fixture
def agus(url: str, customer: Callable[..., Customer]) -> Customer:
    return customer(url, "3456789012", "345678")


# ------------------------------------------------------------ the assignment's four scenarios


def test_tabung_nomor_rekening_dikenali(budi: Customer) -> None:
    before = budi.balance()
    assert answer(budi.deposit(50_000)) == (200, {"saldo": before + 50_000})
    assert budi.balance() == before + 50_000


def test_tabung_nomor_rekening_tidak_dikenali(budi: Customer) -> None:
    before = budi.balance()
    assert answer(budi.post("/tabung", 50_000, no_rekening=NO_SUCH_ACCOUNT)) == UNKNOWN_ACCOUNT
    assert budi.balance() == before


def test_tarik_kurang_dari_saldo(budi: Customer) -> None:
    before = budi.balance()
    assert answer(budi.withdraw(25_000)) == (200, {"saldo": before - 25_000})
    assert budi.balance() == before - 25_000


def test_tarik_lebih_dari_saldo(budi: Customer) -> None:
    before = budi.balance()
    assert answer(budi.withdraw(before + 1)) == INSUFFICIENT_BALANCE
    assert budi.balance() == before


# ------------------------------------------------------------ service mutasi and the statement


def test_movements_arrive_in_the_statement(budi: Customer) -> None:
    nominal = randint(100_000, 999_999)  # so that no earlier balance is taken for the new one
    for jenis in ("tabung", "tarik"):
        saldo = budi.post(f"/{jenis}", nominal).json()["saldo"]
        (entry,) = arrived(budi, [saldo])
        assert isinstance(entry.pop("id_transaksi"), int)
        age = datetime.now(UTC) - datetime.fromisoformat(entry.pop("tanggal_transaksi"))
        assert abs(age) < timedelta(minutes=5)
        assert entry == {"jenis_transaksi": jenis, "nominal": nominal, "saldo_akhir": saldo}


def test_pages_of_the_statement_join_without_gap(siti: Customer) -> None:
    arrived(siti, [siti.deposit(1_000).json()["saldo"]])
    pages = [statement(siti, batas=1)]
    pages.append(statement(siti, batas=1, sebelum=pages[0]["sebelum"]))
    assert pages[0]["mutasi"] + pages[1]["mutasi"] == statement(siti, batas=2)["mutasi"]
    while (cursor := pages[-1]["sebelum"]) is not None:
        pages.append(statement(siti, batas=100, sebelum=cursor))
    ids = [entry["id_transaksi"] for page in pages for entry in page["mutasi"]]
    assert ids == sorted(set(ids), reverse=True)


def test_sixty_four_requests_at_once_lose_and_make_no_money(agus: Customer) -> None:
    before = agus.balance()
    moves = [("/tabung", 10_000), ("/tarik", 15_000)] * 32
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda move: agus.post(*move), moves))
    refused = [response for response in answers if response.status_code != 200]
    assert all(response.request.url.path == "/tarik" for response in refused)
    assert [answer(response) for response in refused] == [INSUFFICIENT_BALANCE] * len(refused)
    assert agus.balance() == before + 32 * 10_000 - (32 - len(refused)) * 15_000 >= 0
    told = [response.json()["saldo"] for response in answers if response not in refused]
    for newer, older in pairwise(arrived(agus, told)):
        change = newer["saldo_akhir"] - older["saldo_akhir"]
        assert change == {"tabung": 1, "tarik": -1}[newer["jenis_transaksi"]] * newer["nominal"]


# ------------------------------------------------------------ who may move which money


def test_another_customers_account_looks_like_one_that_does_not_exist(
    budi: Customer, siti: Customer
) -> None:
    before = budi.balance(), siti.balance()
    for path, other in product(["/tabung", "/tarik"], [siti.no_rekening, NO_SUCH_ACCOUNT]):
        assert answer(budi.post(path, 1, no_rekening=other)) == UNKNOWN_ACCOUNT
    assert (budi.balance(), siti.balance()) == before


def test_every_path_asks_for_account_and_pin_first(url: str) -> None:
    guesses = [None, (NO_SUCH_ACCOUNT, "123456"), ("1234567890", "12345")]
    if not API_URL:  # on a deployment it would count towards the lock of the demo account
        guesses.append(("2345678901", "999999"))
    requests = product(["/tabung", "/tarik", "/saldo", "/mutasi", "/elsewhere"], guesses)
    with ThreadPoolExecutor(8) as clients:
        asked = clients.map(lambda r: httpx.get(f"{url}{r[0]}", auth=r[1], timeout=30), requests)
    for response in asked:
        assert answer(response) == NOT_AUTHENTICATED
        assert response.headers["WWW-Authenticate"] == 'Basic realm="transaksi", charset="UTF-8"'


@pytest.mark.parametrize("nominal", [0, -1, 1.0, 0.5, "5", True, None, 10**12 + 1])
def test_amount_must_be_a_whole_number_of_rupiah(budi: Customer, nominal: Any) -> None:
    remark = "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah."
    assert answer(budi.deposit(nominal)) == (400, {"remark": remark})


def test_whole_balance_may_be_withdrawn_but_not_one_rupiah_more(agus: Customer) -> None:
    before, key = agus.deposit(10_000).json()["saldo"], uuid4().hex
    assert answer(agus.withdraw(before + 1, idempotency_key=key)) == INSUFFICIENT_BALANCE
    agus.deposit(1)
    assert answer(agus.withdraw(before + 1, idempotency_key=key)) == (200, {"saldo": 0})
    assert answer(agus.withdraw(1)) == INSUFFICIENT_BALANCE


# ------------------------------------------------------------ Idempotency-Key, open pages


def test_replayed_key_moves_money_once(budi: Customer) -> None:
    key = uuid4().hex
    first = budi.deposit(700, idempotency_key=key)
    assert (first.status_code, first.headers.get("Idempotent-Replayed")) == (200, None)
    assert budi.deposit(1).status_code == 200  # the replayed balance is that of the first answer
    again = budi.deposit(700, idempotency_key=key)
    assert (answer(again), again.headers["Idempotent-Replayed"]) == (answer(first), "true")
    assert budi.balance() == first.json()["saldo"] + 1


def test_key_of_another_movement_is_refused(budi: Customer, siti: Customer) -> None:
    key = uuid4().hex
    saldo = budi.deposit(700, idempotency_key=key).json()["saldo"]
    assert answer(budi.deposit(701, idempotency_key=key)) == KEY_REUSED
    assert answer(budi.withdraw(700, idempotency_key=key)) == KEY_REUSED
    assert budi.balance() == saldo
    of_siti = siti.deposit(300, idempotency_key=key)
    assert (of_siti.status_code, of_siti.headers.get("Idempotent-Replayed")) == (200, None)


def test_one_key_fifty_times_at_once_moves_money_once(budi: Customer) -> None:
    key = uuid4().hex
    before = budi.balance()
    with ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(lambda _: budi.deposit(700, idempotency_key=key), range(50)))
    assert [answer(response) for response in answers] == [(200, {"saldo": before + 700})] * 50
    assert sum("Idempotent-Replayed" in response.headers for response in answers) == 49
    assert budi.balance() == before + 700


def test_health_and_documentation_are_open(url: str) -> None:
    assert answer(httpx.get(f"{url}/health")) == (200, {"status": "ok"})
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {"/tabung", "/tarik", "/saldo", "/mutasi", "/health"} == set(paths)
    assert "text/html" in httpx.get(f"{url}/docs").headers["Content-Type"]
