"""The rules and the teller's batches without I/O, against an independent model."""

import asyncio
from random import Random
from typing import Any

import pytest

from transaksi import app
from transaksi.app import MAX_SALDO, BankError, Movement, Pending, Receipt, Teller

BUDI, SITI, STRANGER = "1000000001", "1000000002", "9999999999"
BALANCES = (0, 1, 2, 3, 10**6, MAX_SALDO - 2, MAX_SALDO - 1, MAX_SALDO)
NONE: Any = None  # in place of a connection or a database
Made = dict[tuple[str, str | None], tuple[tuple[str, int], int]]  # movement, balance by key


class Books:
    """Stands in for the datastore, with balances and a journal in memory."""

    def __init__(self, balances: dict[str, int]) -> None:
        self.balances = balances
        self.journal: list[dict[str, Any]] = []

    def lock_balances(self, _: Any, accounts: set[str]) -> dict[str, int]:
        return {account: self.balances[account] for account in accounts & self.balances.keys()}

    def find_by_keys(self, _: Any, keys: list[Any]) -> dict[Any, dict[str, Any]]:
        rows = {(row["no_rekening"], row["idempotency_key"]): row for row in self.journal}
        return {key: rows[key] for key in keys if key in rows}

    def record(self, _: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        new = [row | {"id": number} for number, row in enumerate(rows, len(self.journal))]
        self.journal += new
        self.balances |= {row["no_rekening"]: row["saldo_akhir"] for row in new}
        return new


def one_by_one(m: Movement, balances: dict[str, int], made: Made) -> object:
    """The model: the balance and whether it is a replay, or the name of the error."""
    key = (m.no_rekening, m.idempotency_key)
    if m.idempotency_key and key in made:
        first, balance = made[key]
        return (balance, True) if first == (m.jenis_transaksi, m.nominal) else "KeyReused"
    if m.no_rekening not in balances:
        return "NotAuthenticated"
    balance = balances[m.no_rekening] + (m.nominal if m.jenis_transaksi == "tabung" else -m.nominal)
    if not 0 <= balance <= 9_007_199_254_740_991:
        return "InsufficientBalance" if balance < 0 else "BalanceLimit"
    balances[m.no_rekening] = balance
    made[key] = (m.jenis_transaksi, m.nominal), balance
    return balance, False


def outcome(result: Receipt | BankError) -> object:
    if isinstance(result, Receipt):
        return result.saldo, result.replayed
    return type(result).__name__


def new_movement(random: Random) -> Movement:
    account = random.choice((BUDI, BUDI, SITI, STRANGER))
    nominal, key = random.choice((1, 1, 2, 10**12)), random.choice((None, None, "key", "other"))
    return Movement(random.choice(("tabung", "tarik")), account, nominal, key)


@pytest.mark.parametrize("seed", range(20))
def test_batches_decide_what_would_be_decided_one_by_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(seed)
    monkeypatch.setattr(Teller, "MAX_BATCH", 8)

    async def post_some() -> None:
        books = Books({account: random.choice(BALANCES) for account in (BUDI, SITI)})
        monkeypatch.setattr(app, "datastore", books)
        balances, made = dict(books.balances), Made()
        teller, future = Teller(NONE, print), asyncio.get_running_loop().create_future
        arrived = [Pending(new_movement(random), future()) for _ in range(random.randint(1, 40))]
        for pending in arrived:
            teller._queue.put_nowait(pending)
        for late in random.sample(arrived, len(arrived) // 10):
            late.future.cancel()  # its request has timed out

        posted: list[Pending] = []
        while teller.waiting():
            batch = await asyncio.wait_for(teller._next_batch(), 10)
            movements = [pending.movement for pending in batch]
            outcomes = app.decide(NONE, movements).outcomes
            expected = [one_by_one(movement, balances, made) for movement in movements]
            assert [outcome(outcomes[movement]) for movement in movements] == expected
            posted += batch

        assert books.balances == balances
        for key in {pending.movement.key for pending in arrived}:  # each once, in order of arrival
            due = [p for p in arrived if p.movement.key == key and not p.future.cancelled()]
            assert [p for p in posted if p.movement.key == key] == due

    for _ in range(50):
        asyncio.run(post_some())
