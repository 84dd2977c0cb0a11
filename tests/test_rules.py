"""The rules without I/O, for whatever may come: what a batch decides, and what counts as a message."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutasi.api import FIELDS, Invalid
from mutasi.api import parse as parse_message
from mutasi.datastore import Entry
from transaksi.app import (
    MAX_NOMINAL,
    MAX_SALDO,
    Ditolak,
    Gerakan,
    Hasil,
    KunciSudahDipakai,
    Perintah,
    RekeningTidakDikenali,
    SaldoMelebihiBatas,
    SaldoTidakCukup,
    Ulangan,
    decide,
)

ACCOUNTS, STRANGER = ("1000000001", "1000000002", "1000000003"), "9999999999"

balances = st.integers(0, 20) | st.integers(MAX_SALDO - 20, MAX_SALDO) | st.integers(0, MAX_SALDO)
commands = st.builds(
    Perintah,
    st.sampled_from(("tabung", "tarik")),
    st.sampled_from((*ACCOUNTS, STRANGER)),
    st.integers(1, 20) | st.integers(1, MAX_NOMINAL),
    st.sampled_from((None, None, "kunci", "lain")),
)


class OneByOne:
    """The bank as a clerk would keep it: one command after the other, with pen and paper."""

    def __init__(self, saldo: dict[str, int]) -> None:
        self.saldo = dict(saldo)
        self.answered: dict[tuple[str, str], tuple[str, int, int]] = {}

    def serve(self, p: Perintah) -> object:
        """The balance told, ("again", the balance of then), or the class of the refusal."""
        known = self.answered.get((p.no_rekening, p.idempotency_key or ""))
        if known:
            same = known[:2] == (p.jenis_transaksi, p.nominal)
            return ("again", known[2]) if same else KunciSudahDipakai
        if p.no_rekening not in self.saldo:
            return RekeningTidakDikenali
        after = self.saldo[p.no_rekening] + {"tabung": 1, "tarik": -1}[p.jenis_transaksi] * p.nominal
        if after < 0:
            return SaldoTidakCukup
        if after > 2**53 - 1:
            return SaldoMelebihiBatas
        self.saldo[p.no_rekening] = after
        if p.idempotency_key:
            self.answered[p.no_rekening, p.idempotency_key] = (p.jenis_transaksi, p.nominal, after)
        return after


def told(hasil: Hasil) -> object:
    """What `OneByOne.serve` would say."""
    if isinstance(hasil, Ditolak):
        return type(hasil)
    return ("again", hasil.pertama.saldo_akhir) if isinstance(hasil, Ulangan) else hasil.saldo_akhir


@given(st.tuples(balances, balances, balances), st.lists(commands), st.sets(st.integers(1, 50)))
def test_batched_in_any_way_commands_give_what_one_by_one_they_would(
    opening: tuple[int, int, int], queue: list[Perintah], cuts: set[int]
) -> None:
    rekening = dict(zip(ACCOUNTS, opening, strict=True))  # as the database has them
    journal: list[Gerakan] = []
    clerk = OneByOne(rekening)
    edges = [0, *sorted(cut for cut in cuts if cut < len(queue)), len(queue)]
    for start, end in pairwise(edges):
        batch = queue[start:end]
        saldo = {p.no_rekening: rekening[p.no_rekening] for p in batch if p.no_rekening in rekening}
        keys = {(p.no_rekening, p.idempotency_key) for p in batch}
        recorded = {
            (p.no_rekening, p.idempotency_key): gerakan
            for gerakan in journal
            if (p := gerakan.perintah).idempotency_key and (p.no_rekening, p.idempotency_key) in keys
        }
        results = decide(batch, saldo, recorded)
        assert [told(hasil) for hasil in results] == [clerk.serve(p) for p in batch]
        assert all(0 <= amount <= MAX_SALDO for amount in saldo.values())
        journal += [hasil for hasil in results if isinstance(hasil, Gerakan)]
        rekening |= saldo
    assert rekening == clerk.saldo


GOOD = {
    b"id_transaksi": b"17",
    b"tanggal_transaksi": b"2026-01-31T23:59:59.123456+07:00",
    b"no_rekening": b"0123456789",
    b"jenis_transaksi": b"tarik",
    b"nominal": b"25000",
}


def test_a_good_message_is_read_as_it_is() -> None:
    pesan = parse_message(Entry(b"1-0", GOOD))
    assert (pesan.id_transaksi, pesan.no_rekening, pesan.jenis_transaksi) == (17, "0123456789", "tarik")
    assert (pesan.tanggal_transaksi.isoformat(), pesan.nominal, pesan.traceparent) == (
        "2026-01-31T23:59:59.123456+07:00",
        25000,
        None,
    )


@given(
    st.dictionaries(st.sampled_from(sorted(FIELDS)), st.binary() | st.from_regex(rb"[0-9]+"), min_size=1)
    | st.dictionaries(st.binary(), st.binary(), min_size=1)
)
def test_whatever_comes_is_a_sound_message_or_invalid(changes: dict[bytes, bytes]) -> None:
    try:
        pesan = parse_message(Entry(b"1-0", GOOD | changes))
    except Invalid:
        return
    assert 0 <= pesan.id_transaksi < 2**63
    assert 0 <= pesan.nominal < 2**63
    assert 10 <= len(pesan.no_rekening) <= 16
    assert pesan.no_rekening.isascii()
    assert pesan.no_rekening.isdigit()


@given(st.from_regex(rb"20\d\d-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d(Z|[+-][0-9]\d:00)?", fullmatch=True))
def test_what_looks_like_a_date_is_one_with_its_offset_or_invalid(moment: bytes) -> None:
    try:
        pesan = parse_message(Entry(b"1-0", GOOD | {b"tanggal_transaksi": moment}))
    except Invalid:
        return
    assert pesan.tanggal_transaksi.utcoffset() is not None


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00", "9999-12-31T23:59:59.999999"])
@pytest.mark.parametrize("offset", ["+14:00", "-12:00", "+00:00"])
def test_the_ends_of_time_are_dates_too(moment: str, offset: str) -> None:
    pesan = parse_message(Entry(b"1-0", GOOD | {b"tanggal_transaksi": f"{moment}{offset}".encode()}))
    assert pesan.tanggal_transaksi.isoformat() == f"{moment}{offset}"
