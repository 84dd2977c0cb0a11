"""The reviewer's file: the assignment's four scenarios, then the essentials of the contract.

`make test` runs it on servers of its own. With pytest and httpx alone, it tests a running
deployment: `API_URL=http://127.0.0.1:8000 pytest test_api.py`
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise, product
from random import randint
from typing import Any
from uuid import uuid4

import httpx
import pytest

NO_SUCH_ACCOUNT = "9999999999"
UNKNOWN_ACCOUNT = (400, {"remark": "Nomor rekening tidak dikenali."})
INSUFFICIENT_BALANCE = (400, {"remark": "Saldo tidak mencukupi."})
NOT_AUTHENTICATED = (401, {"remark": "Nomor rekening atau PIN salah."})
KEY_REUSED = (422, {"remark": "Idempotency-Key sudah dipakai untuk transaksi lain."})


@dataclass(frozen=True)
class Customer:
    """A customer, who authenticates with an account number and a PIN."""

    client: httpx.Client
    no_rekening: str
    pin: str

    def post(self, path: str, nominal: Any, key: str = "", account: str = "") -> httpx.Response:
        payload = {"no_rekening": account or self.no_rekening, "nominal": nominal}
        headers = {"Idempotency-Key": key} if key else {}
        auth = (self.no_rekening, self.pin)
        return self.client.post(path, json=payload, headers=headers, auth=auth)

    def deposit(self, nominal: Any, key: str = "") -> httpx.Response:
        return self.post("/tabung", nominal, key)

    def withdraw(self, nominal: Any, key: str = "") -> httpx.Response:
        return self.post("/tarik", nominal, key)

    def get(self, path: str, **query: int) -> Any:
        auth = (self.no_rekening, self.pin)
        return self.client.get(path, params=query, auth=auth).raise_for_status().json()

    def balance(self) -> int:
        return int(self.get("/saldo")["saldo"])

    def booked(self, balances: list[int]) -> list[dict[str, Any]]:
        """Return the newest movements of the statement, once they led to these balances."""
        deadline = time.monotonic() + 30
        while True:
            newest: list[dict[str, Any]] = self.get("/mutasi", batas=len(balances))["mutasi"]
            if sorted(movement["saldo_akhir"] for movement in newest) == sorted(balances):
                return newest
            assert time.monotonic() < deadline, f"{newest} never became {balances}"
            time.sleep(0.05)


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """An HTTP client. It uses the proxy of the environment, but not for this machine."""
    direct = dict.fromkeys(("all://127.0.0.1", "all://localhost"))
    with httpx.Client(base_url=url, timeout=30, mounts=direct) as client:
        yield client


@pytest.fixture
def budi(client: httpx.Client) -> Customer:
    return Customer(client, "1234567890", "123456")


@pytest.fixture
def siti(client: httpx.Client) -> Customer:
    return Customer(client, "2345678901", "234567")


@pytest.fixture
def agus(client: httpx.Client) -> Customer:
    return Customer(client, "3456789012", "345678")


def answer(response: httpx.Response) -> tuple[int, Any]:
    return response.status_code, response.json()


# ---------------------------------------------------------------- the assignment's four scenarios


def test_request_tabung_nomor_rekening_dikenali(budi: Customer) -> None:
    before = budi.balance()

    response = budi.deposit(50_000)

    assert answer(response) == (200, {"saldo": before + 50_000})
    assert budi.balance() == before + 50_000


def test_request_tabung_nomor_rekening_tidak_dikenali(budi: Customer) -> None:
    before = budi.balance()

    response = budi.post("/tabung", 50_000, account=NO_SUCH_ACCOUNT)

    assert answer(response) == UNKNOWN_ACCOUNT
    assert budi.balance() == before


def test_request_tarik_saldo_kurang_dari_yang_dimiliki(budi: Customer) -> None:
    before = budi.deposit(30_000).json()["saldo"]

    response = budi.withdraw(25_000)

    assert answer(response) == (200, {"saldo": before - 25_000})
    assert budi.balance() == before - 25_000


def test_request_tarik_saldo_lebih_dari_yang_dimiliki(budi: Customer) -> None:
    before = budi.balance()

    response = budi.withdraw(before + 1)

    assert answer(response) == INSUFFICIENT_BALANCE
    assert budi.balance() == before


# ---------------------------------------------------------------- the essentials of the contract


@pytest.mark.parametrize("jenis_transaksi", ["tabung", "tarik"])
def test_movement_is_booked_in_the_statement(budi: Customer, jenis_transaksi: str) -> None:
    nominal = randint(100_000, 999_999)  # so that no earlier balance is taken for the new one
    budi.deposit(nominal)

    saldo = budi.post(f"/{jenis_transaksi}", nominal).json()["saldo"]

    (movement,) = budi.booked([saldo])
    assert isinstance(movement.pop("id_transaksi"), int)
    age = datetime.now(UTC) - datetime.fromisoformat(movement.pop("tanggal_transaksi"))
    assert abs(age) < timedelta(minutes=5)
    assert movement == {
        "jenis_transaksi": jenis_transaksi,
        "nominal": nominal,
        "saldo_akhir": saldo,
    }


def test_pages_of_the_statement_join_without_gap(siti: Customer) -> None:
    siti.booked([siti.deposit(1_000).json()["saldo"]])

    pages = [siti.get("/mutasi", batas=1)]
    while (cursor := pages[-1]["sebelum"]) is not None:
        pages.append(siti.get("/mutasi", batas=100, sebelum=cursor))

    movements = [movement for page in pages for movement in page["mutasi"]]
    assert movements[:100] == siti.get("/mutasi", batas=100)["mutasi"]
    ids = [movement["id_transaksi"] for movement in movements]
    assert ids == sorted(set(ids), reverse=True)


def test_every_path_asks_for_account_and_pin(client: httpx.Client) -> None:
    paths = ["/tabung", "/tarik", "/saldo", "/mutasi", "/elsewhere"]
    for path, auth in product(paths, [None, (NO_SUCH_ACCOUNT, "123456"), ("1234567890", "12345")]):
        response = client.get(path, auth=auth)

        assert answer(response) == NOT_AUTHENTICATED
        challenge = 'Basic realm="transaksi", charset="UTF-8"'
        assert response.headers["WWW-Authenticate"] == challenge


@pytest.mark.skipif("API_URL" in os.environ, reason="it would count towards a lock of the account")
def test_wrong_pin_is_refused(client: httpx.Client, siti: Customer) -> None:
    before = siti.balance()

    response = Customer(client, siti.no_rekening, "999999").deposit(1)

    assert answer(response) == NOT_AUTHENTICATED
    assert siti.balance() == before


def test_sixty_four_requests_at_once_lose_and_make_no_money(agus: Customer) -> None:
    before = agus.balance()
    requests = [("/tabung", 10_000), ("/tarik", 15_000)] * 32

    with ThreadPoolExecutor(64) as threads:
        responses = list(threads.map(lambda request: agus.post(*request), requests))

    accepted = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response not in accepted]
    assert all(response.request.url.path == "/tarik" for response in refused)
    assert [answer(response) for response in refused] == [INSUFFICIENT_BALANCE] * len(refused)
    withdrawn = 15_000 * (32 - len(refused))
    assert agus.balance() == before + 32 * 10_000 - withdrawn >= 0
    for newer, older in pairwise(agus.booked([one.json()["saldo"] for one in accepted])):
        sign = {"tabung": 1, "tarik": -1}[newer["jenis_transaksi"]]
        assert newer["saldo_akhir"] == older["saldo_akhir"] + sign * newer["nominal"]


def test_whole_balance_may_be_withdrawn(agus: Customer) -> None:
    before = agus.deposit(10_000).json()["saldo"]

    response = agus.withdraw(before)

    assert answer(response) == (200, {"saldo": 0})
    assert answer(agus.withdraw(1)) == INSUFFICIENT_BALANCE


@pytest.mark.parametrize("nominal", [0, -1, 1.0, 0.5, "5", True, None, 10**12 + 1])
def test_amount_must_be_whole_rupiah(budi: Customer, nominal: Any) -> None:
    response = budi.deposit(nominal)

    remark = "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah."
    assert answer(response) == (400, {"remark": remark})


@pytest.mark.parametrize("path", ["/tabung", "/tarik"])
def test_account_of_another_looks_unknown(budi: Customer, siti: Customer, path: str) -> None:
    before = budi.balance(), siti.balance()

    response = budi.post(path, 1, account=siti.no_rekening)

    assert answer(response) == UNKNOWN_ACCOUNT
    assert (budi.balance(), siti.balance()) == before


# ---------------------------------------------------------------- Idempotency-Key, open pages


def test_repeated_key_moves_money_once(budi: Customer) -> None:
    first = budi.deposit(700, key := uuid4().hex)
    assert "Idempotent-Replayed" not in first.headers
    later = budi.deposit(1).json()["saldo"]

    again = budi.deposit(700, key)

    assert answer(again) == answer(first) == (200, {"saldo": later - 1})
    assert again.headers["Idempotent-Replayed"] == "true"
    assert budi.balance() == later


def test_key_of_another_movement_is_refused(budi: Customer) -> None:
    saldo = budi.deposit(700, key := uuid4().hex).json()["saldo"]

    responses = [budi.deposit(701, key), budi.withdraw(700, key)]

    assert [answer(response) for response in responses] == [KEY_REUSED, KEY_REUSED]
    assert budi.balance() == saldo


def test_key_of_another_customer_does_not_matter(budi: Customer, siti: Customer) -> None:
    budi.deposit(700, key := uuid4().hex)

    response = siti.deposit(300, key)

    assert response.status_code == 200
    assert "Idempotent-Replayed" not in response.headers


def test_one_key_fifty_times_at_once_moves_money_once(budi: Customer) -> None:
    before = budi.balance()
    key = uuid4().hex

    with ThreadPoolExecutor(50) as threads:
        responses = list(threads.map(lambda _: budi.deposit(700, key), range(50)))

    assert [answer(response) for response in responses] == [(200, {"saldo": before + 700})] * 50
    assert sum("Idempotent-Replayed" in response.headers for response in responses) == 49
    assert budi.balance() == before + 700


def test_health_and_documentation_are_open(client: httpx.Client) -> None:
    assert answer(client.get("/health")) == (200, {"status": "ok"})
    assert "text/html" in client.get("/docs").headers["Content-Type"]
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/tabung", "/tarik", "/saldo", "/mutasi", "/health"}
