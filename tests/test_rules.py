"""The rules without I/O: what a batch of movements decides."""

from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from transaksi.app import MAX_NOMINAL, MAX_SALDO, Movement, Refusal, decide

ACCOUNTS, STRANGER = ("1000000001", "1000000002", "1000000003"), "9999999999"
balances = st.integers(0, 3) | st.integers(MAX_SALDO - 3, MAX_SALDO) | st.integers(0, MAX_SALDO)
amounts = st.integers(1, 3) | st.integers(1, MAX_NOMINAL)
kinds, keys = st.sampled_from(("tabung", "tarik")), st.sampled_from((None, None, "key", "other"))
movements = st.builds(Movement, kinds, st.sampled_from((*ACCOUNTS, STRANGER)), amounts, keys)
LIMITS = [Movement(*m, 1) for m in 2 * [("tarik", ACCOUNTS[0]), ("tabung", ACCOUNTS[2])]]  # type: ignore


def one_by_one(m: Movement, bank: dict[str, int], made: dict[Any, Movement]) -> object:
    """An independent model, which serves one movement after the other: a remark, or (is it new, movement)."""
    if first := made.get((m.no_rekening, m.idempotency_key)):
        same = (first.jenis_transaksi, first.nominal) == (m.jenis_transaksi, m.nominal)
        return (False, first) if same else "Idempotency-Key sudah dipakai untuk transaksi lain."
    if m.no_rekening not in bank:
        return "Nomor rekening tidak dikenali."
    after = bank[m.no_rekening] + {"tabung": 1, "tarik": -1}[m.jenis_transaksi] * m.nominal
    if not 0 <= after <= 2**53 - 1:
        return "Saldo tidak mencukupi." if after < 0 else "Saldo akan melebihi batas."
    bank[m.no_rekening] = after
    movement = replace(m, saldo_akhir=after)
    if m.idempotency_key:
        made[m.no_rekening, m.idempotency_key] = movement
    return True, movement


@settings(deadline=None)
@given(st.tuples(balances, balances, balances), st.lists(st.lists(movements)))
@example((1, 0, MAX_SALDO - 1), [LIMITS])
def test_movements_in_batches_give_what_they_would_one_by_one(opening: Any, batches: Any) -> None:
    bank: dict[str, int] = dict(zip(ACCOUNTS, opening, strict=True))
    made: dict[Any, Movement] = {}
    for batch in batches:
        balances = {m.no_rekening: bank[m.no_rekening] for m in batch if m.no_rekening in bank}
        found = {
            key: made[key] for m in batch if (key := (m.no_rekening, m.idempotency_key)) in made
        }
        results = [(decide(m, balances, found), m) for m in batch]
        told = [r.remark if isinstance(r, Refusal) else (r is m, r) for r, m in results]
        assert told == [one_by_one(m, bank, made) for m in batch]
        assert bank == bank | balances
