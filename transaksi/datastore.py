"""The tables of service transaksi and its statements. init.sql makes the schema.

Functions take and return plain values and rows. Amounts are whole rupiah.
"""

import asyncio
import contextvars
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any, ClassVar, TypeVar, TypeVarTuple

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    ForeignKey,
    Identity,
    RowMapping,
    Text,
    any_,
    bindparam,
    case,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from common.config import Settings
from common.connections import COLUMN_TYPES, open_engine
from common.stream import JenisTransaksi

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Key = tuple[str, str]  # account, idempotency key


class Database:
    """An engine with threads of its own, so that a slow user cannot starve another.

    `nice` gives the threads a low priority, on Linux, where niceness is per thread.
    """

    def __init__(self, settings: Settings, threads: int, nice: int = 0) -> None:
        self.engine = open_engine(settings)
        initializer = (lambda: os.nice(nice)) if sys.platform == "linux" else None
        self._executor = ThreadPoolExecutor(threads, initializer=initializer)

    def run(self, function: Callable[[Engine, *Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Call `function(engine, ...)` in a thread, with the caller's context variables."""
        run = contextvars.copy_context().run
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._executor, run, function, self.engine, *args)

    def close(self) -> None:
        """Cancel the calls that have not begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)


NOW = func.clock_timestamp()  # now() would be the start of the transaction


class Base(DeclarativeBase):
    """The tables of service transaksi."""

    type_annotation_map: ClassVar = COLUMN_TYPES


class Rekening(Base):
    """A customer's account and its balance."""

    __tablename__ = "rekening"

    no_rekening: Mapped[str] = mapped_column(primary_key=True)
    saldo: Mapped[int]


class Kredensial(Base):
    """The PIN of an account, and the attempts since the last correct one."""

    __tablename__ = "kredensial"

    no_rekening: Mapped[str] = mapped_column(ForeignKey(Rekening.no_rekening), primary_key=True)
    pin_hash: Mapped[str]
    pin_gagal: Mapped[int]
    terkunci_sampai: Mapped[datetime | None]


class Transaksi(Base):
    """The journal: one row for each accepted movement."""

    __tablename__ = "transaksi"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    no_rekening: Mapped[str] = mapped_column(ForeignKey(Rekening.no_rekening))
    jenis_transaksi: Mapped[JenisTransaksi]
    nominal: Mapped[int]
    saldo_akhir: Mapped[int]
    tanggal_transaksi: Mapped[datetime]
    idempotency_key: Mapped[str | None]
    traceparent: Mapped[str | None]


class Outbox(Base):
    """A movement that is not booked yet."""

    __tablename__ = "outbox"

    id_transaksi: Mapped[int] = mapped_column(ForeignKey(Transaksi.id), primary_key=True)
    dikirim_pada: Mapped[datetime]


class Mutasi(Base):
    """A booked movement, written by service mutasi."""

    __tablename__ = "mutasi"

    id_transaksi: Mapped[int] = mapped_column(ForeignKey(Transaksi.id), primary_key=True)
    no_rekening: Mapped[str]
    tanggal_transaksi: Mapped[datetime]
    jenis_transaksi: Mapped[JenisTransaksi]
    nominal: Mapped[int]


# ---------------------------------------------------------------- a batch of movements


# In sorted order, so that tellers lock in the same order and cannot deadlock. NO KEY UPDATE
# (`key_share`), so that others may insert rows that refer to the accounts.
LOCK_BALANCES = (
    select(Rekening.no_rekening, Rekening.saldo)
    .where(Rekening.no_rekening == any_(bindparam("accounts", type_=ARRAY(Text))))
    .order_by(Rekening.no_rekening)
    .with_for_update(key_share=True)
)
FIND_BY_KEYS = select(*Transaksi.__table__.c).where(
    tuple_(Transaksi.no_rekening, Transaksi.idempotency_key).in_(bindparam("keys", expanding=True))
)


def unnest(name: str, column_type: Any) -> ColumnElement[Any]:
    """Return the elements of an array parameter as rows, one array for each column.

    So a batch of any size is the same statement, unlike with a list of VALUES.
    https://www.postgresql.org/docs/18/xfunc-sql.html: several in one SELECT are read in step.
    """
    return func.unnest(bindparam(name, type_=ARRAY(column_type)))


# What is written for a batch: one statement, because each costs a round trip.
#   WITH journal AS (INSERT INTO transaksi ... SELECT unnest(...), ... RETURNING *),
#     new_outbox AS (INSERT INTO outbox SELECT id FROM journal),
#     new_balances AS (UPDATE rekening SET saldo = ... FROM (SELECT unnest(...), unnest(...)))
#   SELECT * FROM journal

# The columns of a new journal row that PostgreSQL does not fill in itself.
NEW_COLUMNS = {
    column.name: column.type
    for column in Transaksi.__table__.c
    if column.name not in ("id", "tanggal_transaksi")
}
JOURNAL = (
    insert(Transaksi)
    .from_select(
        list(NEW_COLUMNS),
        select(*[unnest(f"{name}_array", kind) for name, kind in NEW_COLUMNS.items()]),
    )
    .returning(*Transaksi.__table__.c)
    .cte("journal")
)
OUTBOX = insert(Outbox).from_select(["id_transaksi"], select(JOURNAL.c.id)).cte("new_outbox")
NEW_BALANCES = select(
    unnest("accounts", Text).label("no_rekening"),
    unnest("balances", BigInteger).label("saldo"),
).subquery()
BALANCES = (
    update(Rekening)
    .where(Rekening.no_rekening == NEW_BALANCES.c.no_rekening)
    .values(saldo=NEW_BALANCES.c.saldo)
    .cte("new_balances")
)
RECORD = select(JOURNAL).add_cte(OUTBOX, BALANCES)


def lock_balances(connection: Connection, accounts: Collection[str]) -> dict[str, int]:
    """Lock accounts until the transaction ends. Returns the balances of those that exist."""
    rows = connection.execute(LOCK_BALANCES, {"accounts": list(accounts)})
    return dict(rows.all())


def find_by_keys(connection: Connection, keys: Collection[Key]) -> dict[Key | None, RowMapping]:
    """Find earlier movements by account and idempotency key.

    It must follow the lock as a statement of its own: only then does it see the keys that
    the previous holder of the lock committed.
    """
    if not keys:
        return {}
    rows = connection.execute(FIND_BY_KEYS, {"keys": keys}).mappings()
    return {(row["no_rekening"], row["idempotency_key"]): row for row in rows}


def record(connection: Connection, movements: Sequence[Mapping[str, Any]]) -> list[RowMapping]:
    """Write movements to the journal, the outbox and the balances.

    Returns their journal rows in the same order.
    """
    if not movements:
        return []
    arrays = {f"{name}_array": [row[name] for row in movements] for name in NEW_COLUMNS}
    # Of several movements of an account, the last sets its balance.
    balances = {row["no_rekening"]: row["saldo_akhir"] for row in movements}
    new_balances = {"accounts": list(balances), "balances": list(balances.values())}
    rows = connection.execute(RECORD, arrays | new_balances).mappings()
    return sorted(rows, key=itemgetter("id"))  # ids follow the arrays, RETURNING need not


# ---------------------------------------------------------------- reads


FIND_BALANCE = select(Rekening.saldo).where(Rekening.no_rekening == bindparam("account"))

NEWEST_FIRST = Mutasi.id_transaksi.desc()
# Ids are selected first: an index alone can answer that, and stop at the limit.
PAGE_IDS = (
    select(Mutasi.id_transaksi)
    .where(Mutasi.no_rekening == bindparam("account"))
    .where(Mutasi.id_transaksi < bindparam("before"))
    .order_by(NEWEST_FIRST)
    .limit(bindparam("limit"))
)
FIND_MUTATIONS = (
    select(*Mutasi.__table__.c, Transaksi.saldo_akhir)
    .join(Transaksi)
    .where(Mutasi.id_transaksi.in_(PAGE_IDS))
    .order_by(NEWEST_FIRST)
)
MAX_ID = 2**63 - 1


def find_balance(engine: Engine, account: str) -> int | None:
    """Return the balance of an account, or None if there is no such account."""
    with engine.connect() as connection:
        return connection.scalar(FIND_BALANCE, {"account": account})


def find_mutations(
    engine: Engine, account: str, before: int | None, limit: int
) -> Sequence[RowMapping]:
    """Return up to `limit` booked movements of an account, newest first.

    With `before`, only those with lower ids.
    """
    end = MAX_ID if before is None else before
    page = {"account": account, "before": end, "limit": limit}
    with engine.connect() as connection:
        return connection.execute(FIND_MUTATIONS, page).mappings().all()


def ping(engine: Engine) -> None:
    """Raise DBAPIError if PostgreSQL cannot be reached or takes no writes."""
    with engine.connect() as connection:
        # A server that takes no writes refuses row locks, even on no rows.
        connection.execute(select(Rekening.saldo).limit(0).with_for_update(key_share=True))


# ---------------------------------------------------------------- PIN attempts


def count_attempt(
    engine: Engine, account: str, max_failures: int, lock_minutes: int
) -> RowMapping | None:
    """Count a PIN attempt before checking it. The last allowed one locks the account.

    Returns `pin_hash` and the count `pin_gagal`, or None for an unknown or locked account. A
    lock that ends in more than `lock_minutes` was made by a wrong clock, and is ignored.
    """
    lock_end = NOW + timedelta(minutes=lock_minutes)
    count = Kredensial.pin_gagal + 1
    locked = Kredensial.terkunci_sampai.between(NOW, lock_end)
    statement = (
        update(Kredensial)
        .where(Kredensial.no_rekening == account, locked.is_not(True))
        .values(
            pin_gagal=count,
            terkunci_sampai=case((count >= max_failures, lock_end)),
        )
        .returning(Kredensial.pin_hash, Kredensial.pin_gagal)
    )
    with engine.begin() as connection:
        return connection.execute(statement).mappings().one_or_none()


def reset_attempts(engine: Engine, account: str, count: int) -> None:
    """Unlock an account, unless another attempt was counted after this one."""
    statement = (
        update(Kredensial)
        .where(Kredensial.no_rekening == account, Kredensial.pin_gagal == count)
        .values(pin_gagal=0, terkunci_sampai=None)
    )
    with engine.begin() as connection:
        connection.execute(statement)


# ---------------------------------------------------------------- the outbox


def outbox_count(engine: Engine) -> int:
    """Return the number of movements that are not booked."""
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(Outbox)) or 0


def outbox_age(engine: Engine) -> float:
    """Return the age in seconds of the oldest movement that is not booked, 0 if all are.

    A time ahead of now, from a clock that was wrong, counts as an age, too.
    """
    age = func.extract("epoch", NOW - Transaksi.tanggal_transaksi)
    statement = select(func.abs(age)).join(Outbox).order_by(Outbox.id_transaksi).limit(1)
    with engine.connect() as connection:
        return float(connection.scalar(statement) or 0)


def claim_lost(engine: Engine, after_s: float, limit: int) -> Sequence[RowMapping]:
    """Mark movements that were last sent over `after_s` seconds ago as sent now.

    Returns the journal rows of up to `limit` of them. Rows that another process claims at
    the same moment are skipped.
    """
    recently_sent = Outbox.dikirim_pada.between(NOW - timedelta(seconds=after_s), NOW)
    lost = (
        select(Outbox.id_transaksi)
        .where(~recently_sent)
        .order_by(Outbox.id_transaksi)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("lost")
    )
    claim = (
        update(Outbox)
        .where(Outbox.id_transaksi == lost.c.id_transaksi, Transaksi.id == lost.c.id_transaksi)
        .values(dikirim_pada=NOW)
        .returning(*Transaksi.__table__.c)
    )
    with engine.begin() as connection:
        return connection.execute(claim).mappings().all()
