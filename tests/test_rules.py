"""The rules without I/O: what a batch of commands decides, and what counts as a stream message."""

import re
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mutasi.api import flaw
from transaksi.app import MAX_NOMINAL, MAX_SALDO, Command, Movement, Refusal, Replay, decide

ACCOUNTS, STRANGER = ("1000000001", "1000000002", "1000000003"), "9999999999"
balances = st.integers(0, 3) | st.integers(MAX_SALDO - 3, MAX_SALDO) | st.integers(0, MAX_SALDO)
amounts = st.integers(1, 3) | st.integers(1, MAX_NOMINAL)
kinds, keys = st.sampled_from(("tabung", "tarik")), st.sampled_from((None, None, "key", "other"))
commands = st.builds(Command, kinds, st.sampled_from((*ACCOUNTS, STRANGER)), amounts, keys)
AT_THE_LIMITS = [Command("tarik", ACCOUNTS[0], 1), Command("tabung", ACCOUNTS[2], 1)] * 2


def one_by_one(c: Command, bank: dict[str, int], made: dict[Any, Movement]) -> object:
    """An independent model, which serves one command after the other; a refusal is its remark."""
    if first := made.get((c.no_rekening, c.idempotency_key)):
        old = first.command
        same = (old.jenis_transaksi, old.nominal) == (c.jenis_transaksi, c.nominal)
        return Replay(first) if same else "Idempotency-Key sudah dipakai untuk transaksi lain."
    if c.no_rekening not in bank:
        return "Nomor rekening tidak dikenali."
    after = bank[c.no_rekening] + {"tabung": 1, "tarik": -1}[c.jenis_transaksi] * c.nominal
    if not 0 <= after <= 2**53 - 1:
        return "Saldo tidak mencukupi." if after < 0 else "Saldo akan melebihi batas."
    bank[c.no_rekening] = after
    movement = Movement(c, after)
    if c.idempotency_key:
        made[c.no_rekening, c.idempotency_key] = movement
    return movement


@settings(deadline=None)
@given(st.tuples(balances, balances, balances), st.lists(st.lists(commands)))
@example((1, 0, MAX_SALDO - 1), [AT_THE_LIMITS])
def test_commands_in_batches_give_what_they_would_one_by_one(opening: Any, batches: Any) -> None:
    bank: dict[str, int] = dict(zip(ACCOUNTS, opening, strict=True))
    made: dict[Any, Movement] = {}
    for batch in batches:
        accounts = bank.keys() & {c.no_rekening for c in batch}
        balances = {account: bank[account] for account in accounts}
        keys = made.keys() & {(c.no_rekening, c.idempotency_key) for c in batch}
        results = decide(batch, balances, {key: made[key] for key in keys})
        told = [result.remark if isinstance(result, Refusal) else result for result in results]
        assert told == [one_by_one(c, bank, made) for c in batch]
        assert bank == bank | balances


GOOD = {b"id_transaksi": b"17", b"tanggal_transaksi": b"2026-01-31T23:59:59.123456+07:00"}
GOOD |= {b"no_rekening": b"0123456789", b"jenis_transaksi": b"tarik", b"nominal": b"25000"}
FORM = b"[0-9]{1,18} [0-9T:.Z+-]+ [0-9]{10,16} (tabung|tarik) [0-9]{1,18}"
names = st.sampled_from([*GOOD, b"traceparent"]) | st.binary()


@settings(deadline=None)
@given(st.dictionaries(names, st.binary() | st.from_regex(b"[0-9]+"), max_size=2))
def test_any_fields_are_a_well_formed_message_or_flawed(changes: dict[bytes, bytes]) -> None:
    fields = GOOD | changes
    if not flaw(fields):
        assert fields.keys() - {b"traceparent"} == GOOD.keys()
        assert re.fullmatch(FORM, b" ".join(fields[name] for name in GOOD))
