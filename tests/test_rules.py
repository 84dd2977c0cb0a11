"""The rules without I/O: what a batch of commands decides, and what counts as a stream message."""

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mutasi.api import flaw
from transaksi.app import MAX_NOMINAL, MAX_SALDO, Command, Movement, Refusal, Replay, decide

ACCOUNTS, STRANGER = ("1000000001", "1000000002", "1000000003"), "9999999999"

balances = st.integers(0, 3) | st.integers(MAX_SALDO - 3, MAX_SALDO) | st.integers(0, MAX_SALDO)
commands = st.builds(
    Command,
    st.sampled_from(("tabung", "tarik")),
    st.sampled_from((*ACCOUNTS, STRANGER)),
    st.integers(1, 3) | st.integers(1, MAX_NOMINAL),
    st.sampled_from((None, None, "key", "other")),
)


class OneByOne:
    """An independent model of the bank, which serves one command after the other."""

    def __init__(self, balances: dict[str, int]) -> None:
        self.balances = dict(balances)
        self.answered: dict[tuple[str, str], tuple[str, int, int]] = {}

    def serve(self, c: Command) -> object:
        """The balance afterwards, ("again", the first answer's balance), or the refusal's remark."""
        if known := self.answered.get((c.no_rekening, c.idempotency_key or "")):
            if known[:2] != (c.jenis_transaksi, c.nominal):
                return "Idempotency-Key sudah dipakai untuk transaksi lain."
            return "again", known[2]
        if c.no_rekening not in self.balances:
            return "Nomor rekening tidak dikenali."
        after = self.balances[c.no_rekening] + {"tabung": 1, "tarik": -1}[c.jenis_transaksi] * c.nominal
        if after < 0:
            return "Saldo tidak mencukupi."
        if after > 2**53 - 1:
            return "Saldo akan melebihi batas."
        self.balances[c.no_rekening] = after
        if c.idempotency_key:
            self.answered[c.no_rekening, c.idempotency_key] = (c.jenis_transaksi, c.nominal, after)
        return after


def told(result: Movement | Replay | Refusal) -> object:
    """What `OneByOne.serve` would return."""
    if isinstance(result, Refusal):
        return result.remark
    return ("again", result.first.saldo_akhir) if isinstance(result, Replay) else result.saldo_akhir


@settings(deadline=None)
@given(st.tuples(balances, balances, balances), st.lists(commands), st.sets(st.integers(1, 50)))
@example((1, 0, MAX_SALDO - 1), [Command("tarik", ACCOUNTS[0], 1), Command("tabung", ACCOUNTS[2], 1)], set())
def test_commands_in_batches_give_what_they_would_one_by_one(
    opening: tuple[int, int, int], queue: list[Command], cuts: set[int]
) -> None:
    stored = dict(zip(ACCOUNTS, opening, strict=True))
    journal: dict[tuple[str, str], Movement] = {}
    model = OneByOne(stored)
    edges = [0, *sorted(cut for cut in cuts if cut < len(queue)), len(queue)]
    for start, end in pairwise(edges):
        batch = queue[start:end]
        found = {c.no_rekening: stored[c.no_rekening] for c in batch if c.no_rekening in stored}
        keys = {(c.no_rekening, c.idempotency_key) for c in batch}
        results = decide(batch, found, {key: first for key, first in journal.items() if key in keys})
        assert [told(result) for result in results] == [model.serve(c) for c in batch]
        assert all(0 <= balance <= MAX_SALDO for balance in found.values())
        stored |= found
        moved = [r for r in results if isinstance(r, Movement) and r.command.idempotency_key]
        journal |= {(r.command.no_rekening, r.command.idempotency_key or ""): r for r in moved}
    assert stored == model.balances


GOOD = {
    "id_transaksi": "17",
    "tanggal_transaksi": "2026-01-31T23:59:59.123456+07:00",
    "no_rekening": "0123456789",
    "jenis_transaksi": "tarik",
    "nominal": "25000",
}


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(GOOD)), st.text() | st.from_regex("[0-9]+"))
    | st.dictionaries(st.text() | st.just("traceparent"), st.text(), max_size=2),
    st.sets(st.sampled_from(sorted(GOOD)), max_size=1),
)
@example({}, set())
def test_any_fields_are_a_well_formed_message_or_flawed(changes: dict[str, str], missing: set[str]) -> None:
    fields = {name: value for name, value in (GOOD | changes).items() if name not in missing}
    if flaw(fields):
        assert fields != GOOD
        return
    assert fields.keys() - {"traceparent"} == GOOD.keys()
    numbers = [fields[name] for name in ("no_rekening", "id_transaksi", "nominal")]
    assert all(number.isascii() and number.isdigit() and int(number) < 2**63 for number in numbers)
    assert 10 <= len(numbers[0]) <= 16
    assert fields["jenis_transaksi"] in ("tabung", "tarik")
