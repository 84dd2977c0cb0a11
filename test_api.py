"""The reviewer's file: the assignment's four scenarios, then the essentials of the contract.

`make test` runs it on servers of its own. With pytest and httpx alone, it tests a running
deployment: `API_URL=http://127.0.0.1:8000 pytest test_api.py`
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from uuid import uuid4

import httpx
import pytest

UNKNOWN_ACCOUNT = (400, {"remark": "Nomor rekening tidak dikenali."})
INSUFFICIENT_BALANCE = (400, {"remark": "Saldo tidak mencukupi."})
NOT_AUTHENTICATED = (401, {"remark": "Nomor rekening atau PIN salah."})
KEY_REUSED = (422, {"remark": "Idempotency-Key sudah dipakai untuk transaksi lain."})


def answer(response: httpx.Response) -> tuple[int, Any]:
    return response.status_code, response.json()


class Customer:
    """A customer, who authenticates with an account number and a PIN."""

    def __init__(self, client: httpx.Client, no_rekening: str, pin: str) -> None:
        self.client, self.no_rekening, self.auth = client, no_rekening, (no_rekening, pin)

    def post(self, path: str, nominal: int, key: str = "", account: str = "") -> httpx.Response:
        payload = {"no_rekening": account or self.no_rekening, "nominal": nominal}
        headers = {"Idempotency-Key": key} if key else {}
        return self.client.post(path, json=payload, headers=headers, auth=self.auth)

    def get(self, path: str, **query: int) -> Any:
        response = self.client.get(path, params=query, auth=self.auth)
        return response.raise_for_status().json()

    def balance(self) -> int:
        return int(self.get("/saldo")["saldo"])

    def booked(self, balances: list[int]) -> list[dict[str, Any]]:
        """Return the newest movements of the statement, once they led to these balances."""
        for _ in range(600):
            newest: list[dict[str, Any]] = self.get("/mutasi", batas=len(balances))["mutasi"]
            if sorted(movement["saldo_akhir"] for movement in newest) == sorted(balances):
                return newest
            time.sleep(0.05)
        pytest.fail(f"{newest} never led to {balances}")


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
def agus(client: httpx.Client) -> Customer:
    return Customer(client, "3456789012", "345678")


def test_request_tabung_nomor_rekening_dikenali(budi: Customer) -> None:
    before = budi.balance()

    response = budi.post("/tabung", 50_000)

    assert answer(response) == (200, {"saldo": before + 50_000})
    assert budi.balance() == before + 50_000


def test_request_tabung_nomor_rekening_tidak_dikenali(budi: Customer) -> None:
    before = budi.balance()

    response = budi.post("/tabung", 50_000, account="9999999999")

    assert answer(response) == UNKNOWN_ACCOUNT
    assert budi.balance() == before


def test_request_tarik_saldo_kurang_dari_yang_dimiliki(budi: Customer) -> None:
    before = budi.post("/tabung", 30_000).json()["saldo"]

    response = budi.post("/tarik", 25_000)

    assert answer(response) == (200, {"saldo": before - 25_000})
    assert budi.balance() == before - 25_000


def test_request_tarik_saldo_lebih_dari_yang_dimiliki(budi: Customer) -> None:
    before = budi.balance()

    response = budi.post("/tarik", before + 1)

    assert answer(response) == INSUFFICIENT_BALANCE
    assert budi.balance() == before


def test_movement_is_booked_in_the_statement(budi: Customer) -> None:
    saldo = budi.post("/tabung", 250_000).json()["saldo"]

    (movement,) = budi.booked([saldo])

    assert isinstance(movement.pop("id_transaksi"), int)
    assert datetime.fromisoformat(movement.pop("tanggal_transaksi")).tzinfo == UTC
    assert movement == {"jenis_transaksi": "tabung", "nominal": 250_000, "saldo_akhir": saldo}


def test_strangers_are_refused(client: httpx.Client) -> None:
    stranger = Customer(client, "9999999999", "999999")
    assert answer(stranger.post("/tabung", 1)) == NOT_AUTHENTICATED
    assert answer(client.get("/saldo")) == NOT_AUTHENTICATED


@pytest.mark.skipif(bool(os.environ.get("API_URL")), reason="it would count towards a lock")
def test_wrong_pin_is_refused(client: httpx.Client, budi: Customer) -> None:
    response = Customer(client, budi.no_rekening, "999999").post("/tabung", 1)

    assert answer(response) == NOT_AUTHENTICATED


def test_sixty_four_requests_at_once_lose_and_make_no_money(agus: Customer) -> None:
    before = agus.balance()
    paths, amounts = ["/tabung", "/tarik"] * 32, [10_000, 15_000] * 32

    with ThreadPoolExecutor(64) as threads:
        responses = list(threads.map(agus.post, paths, amounts))

    refused = [one for one in responses if one.status_code != 200]
    assert all(answer(one) == INSUFFICIENT_BALANCE for one in refused)
    assert agus.balance() == before + 32 * 10_000 - (32 - len(refused)) * 15_000 >= 0
    balances = [one.json()["saldo"] for one in responses if one not in refused]
    for newer, older in pairwise(agus.booked(balances)):
        sign = {"tabung": 1, "tarik": -1}[newer["jenis_transaksi"]]
        assert newer["saldo_akhir"] == older["saldo_akhir"] + sign * newer["nominal"]


def test_whole_balance_may_be_withdrawn(agus: Customer) -> None:
    saldo = agus.post("/tabung", 10_000).json()["saldo"]
    assert answer(agus.post("/tarik", saldo)) == (200, {"saldo": 0})
    assert answer(agus.post("/tarik", 1)) == INSUFFICIENT_BALANCE


def test_account_of_another_customer_looks_unknown(budi: Customer, agus: Customer) -> None:
    before = agus.balance()
    assert answer(budi.post("/tabung", 1, account=agus.no_rekening)) == UNKNOWN_ACCOUNT
    assert answer(budi.post("/tarik", 1, account=agus.no_rekening)) == UNKNOWN_ACCOUNT
    assert agus.balance() == before


def test_repeated_key_moves_money_once(budi: Customer) -> None:
    first = budi.post("/tabung", 700, key := uuid4().hex)
    later = budi.post("/tabung", 1).json()["saldo"]

    again = budi.post("/tabung", 700, key)

    assert answer(again) == answer(first) == (200, {"saldo": later - 1})
    assert [one.headers.get("Idempotent-Replayed") for one in (first, again)] == [None, "true"]
    assert budi.balance() == later


def test_key_of_another_movement_is_refused(budi: Customer, agus: Customer) -> None:
    saldo = budi.post("/tabung", 700, key := uuid4().hex).json()["saldo"]
    assert answer(budi.post("/tabung", 701, key)) == KEY_REUSED
    assert answer(budi.post("/tarik", 700, key)) == KEY_REUSED
    assert budi.balance() == saldo
    assert "Idempotent-Replayed" not in agus.post("/tabung", 300, key).raise_for_status().headers


def test_one_key_fifty_times_at_once_moves_money_once(budi: Customer) -> None:
    before, key = budi.balance(), uuid4().hex

    with ThreadPoolExecutor(50) as threads:
        responses = list(threads.map(lambda _: budi.post("/tabung", 700, key), range(50)))

    assert all(answer(one) == (200, {"saldo": before + 700}) for one in responses)
    assert sum("Idempotent-Replayed" in one.headers for one in responses) == 49
    assert budi.balance() == before + 700


def test_health_and_documentation_are_open(client: httpx.Client) -> None:
    assert answer(client.get("/health")) == (200, {"status": "ok"})
    assert "text/html" in client.get("/docs").headers["Content-Type"]
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/tabung", "/tarik", "/saldo", "/mutasi", "/health"}
