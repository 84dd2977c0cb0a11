"""The tables of service transaksi and its database operations. init.sql makes the schema.

Reads use the mapped classes. The statements of the hot path are SQL, many rows each: the ORM's unit of work
would cost twice as much.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import Connection, Engine, Executable, ForeignKey, Row, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from transaksi.app import JenisTransaksi, Key, Movement


class Base(DeclarativeBase):
    """The tables of service transaksi as init.sql makes them."""


class Rekening(Base):
    """A customer's account and its balance."""

    __tablename__ = "rekening"
    no_rekening: Mapped[str] = mapped_column(primary_key=True)
    nama: Mapped[str]
    saldo: Mapped[int]
    dibuat_pada: Mapped[datetime]


class Transaksi(Base):
    """The journal: one row per accepted movement, append-only."""

    __tablename__ = "transaksi"
    id: Mapped[int] = mapped_column(primary_key=True)
    no_rekening: Mapped[str] = mapped_column(ForeignKey(Rekening.no_rekening))
    jenis_transaksi: Mapped[JenisTransaksi]
    nominal: Mapped[int]
    saldo_akhir: Mapped[int]
    tanggal_transaksi: Mapped[datetime]
    idempotency_key: Mapped[str | None]
    traceparent: Mapped[str | None]


class Mutasi(Base):
    """The mutation book, append-only, written by service mutasi."""

    __tablename__ = "mutasi"
    id_transaksi: Mapped[int] = mapped_column(ForeignKey(Transaksi.id), primary_key=True)
    no_rekening: Mapped[str] = mapped_column(primary_key=True)
    tanggal_transaksi: Mapped[datetime] = mapped_column(primary_key=True)
    jenis_transaksi: Mapped[JenisTransaksi] = mapped_column(primary_key=True)
    nominal: Mapped[int] = mapped_column(primary_key=True)
    dicatat_pada: Mapped[datetime]


def _rows(engine: Engine, statement: Executable, **parameters: Any) -> Sequence[Row[Any]]:
    """Execute a statement in a transaction of its own."""
    with engine.begin() as connection:
        return connection.execute(statement, parameters).all()


def find_balance(engine: Engine, account: str) -> int:
    """The balance of an account in whole rupiah."""
    return int(_rows(engine, select(Rekening.saldo).filter_by(no_rekening=account))[0].saldo)


def find_mutations(engine: Engine, account: str, before: int, limit: int) -> Sequence[Row[Any]]:
    """Up to `limit` booked movements of an account, newest first, with ids below `before`."""
    newest_first = Mutasi.id_transaksi.desc()
    # The ids alone, so that the index by account answers under every plan.
    of_account = Mutasi.no_rekening == account, Mutasi.id_transaksi < before
    ids = select(Mutasi.id_transaksi).where(*of_account).order_by(newest_first).limit(limit)
    statement = select(*Mutasi.__table__.c, Transaksi.saldo_akhir).join(Transaksi)
    return _rows(engine, statement.where(Mutasi.id_transaksi.in_(ids)).order_by(newest_first))


# Sorted: all tellers lock in one order, no deadlock. NO KEY, so that foreign keys may go on reading.
_LOCK = text("""
    SELECT no_rekening, saldo FROM rekening WHERE no_rekening = ANY (:accounts)
    ORDER BY no_rekening FOR NO KEY UPDATE""")
_FIND_KEYS = text("""
    SELECT transaksi.* FROM transaksi
    JOIN json_to_recordset(:movements) AS wanted (no_rekening text, idempotency_key text)
    USING (no_rekening, idempotency_key)""")
# The ids follow the order of the movements.
_RECORD = text("""
    WITH recorded AS (
        INSERT INTO transaksi
            (no_rekening, jenis_transaksi, nominal, saldo_akhir, idempotency_key, traceparent)
        SELECT no_rekening, jenis_transaksi, nominal, saldo_akhir, idempotency_key, traceparent
        FROM json_populate_recordset(NULL::transaksi, :movements) WITH ORDINALITY ORDER BY ordinality
        RETURNING id, tanggal_transaksi, no_rekening, saldo_akhir),
    queued AS (INSERT INTO outbox (id_transaksi) SELECT id FROM recorded),
    updated AS (
        UPDATE rekening SET saldo = saldo_akhir
        FROM (SELECT DISTINCT ON (no_rekening) * FROM recorded ORDER BY no_rekening, id DESC) AS last
        WHERE rekening.no_rekening = last.no_rekening)
    SELECT id, tanggal_transaksi FROM recorded ORDER BY id""")


def lock_balances(connection: Connection, accounts: set[str]) -> dict[str, int]:
    """Lock these accounts until the transaction ends. Returns the balances of those that exist."""
    return dict(connection.execute(_LOCK, {"accounts": list(accounts)}).all())


def find_keys(connection: Connection, movements: list[Movement]) -> dict[Key, Movement]:
    """The movements that were made under the keys of these.

    A statement of its own, after the lock: its snapshot has what the last holder of the lock committed.
    """
    found = connection.execute(_FIND_KEYS, {"movements": orjson.dumps(movements).decode()})
    return {(row.no_rekening, row.idempotency_key): Movement(**row._mapping) for row in found}


def record(connection: Connection, movements: list[Movement]) -> None:
    """Write movements to balances, journal and outbox, and set their ids and times."""
    recorded = connection.execute(_RECORD, {"movements": orjson.dumps(movements).decode()})
    for movement, row in zip(movements, recorded, strict=True):
        movement.id, movement.tanggal_transaksi = row


_COUNT_ATTEMPT = text("""
    UPDATE kredensial SET pin_gagal = pin_gagal + 1, terkunci_sampai = CASE
        WHEN pin_gagal + 1 >= :limit THEN clock_timestamp() + make_interval(mins => :lock_minutes) END
    WHERE no_rekening = :account AND coalesce(terkunci_sampai <= clock_timestamp(), true)
    RETURNING pin_hash, pin_gagal""")
_FORGET_ATTEMPTS = text("""
    UPDATE kredensial SET pin_gagal = 0, terkunci_sampai = NULL
    WHERE no_rekening = :account AND pin_gagal = :count RETURNING true""")


def count_attempt(engine: Engine, account: str, limit: int, lock_minutes: int) -> Row[Any] | None:
    """Count a PIN attempt, before it is made. The `limit`-th since the last right PIN locks the account.

    Returns pin_hash and the count (pin_gagal), None for an unknown or a locked account.
    """
    rows = _rows(engine, _COUNT_ATTEMPT, account=account, limit=limit, lock_minutes=lock_minutes)
    return rows[0] if rows else None


def forget_attempts(engine: Engine, account: str, count: int) -> None:
    """Set the count back to zero and unlock, unless another attempt was counted after this one."""
    _rows(engine, _FORGET_ATTEMPTS, account=account, count=count)


_OUTBOX_AGE = text("""
    SELECT coalesce(extract(epoch FROM clock_timestamp() - min(tanggal_transaksi)), 0)::float8 AS age_s
    FROM transaksi WHERE id = (SELECT min(id_transaksi) FROM outbox)""")
# ARRAY looks up each id by the primary key under every plan, and never scans the journal.
_MARK_LOST = text("""
    WITH marked AS (
        UPDATE outbox SET dikirim_pada = clock_timestamp()
        WHERE id_transaksi = ANY (ARRAY(
            SELECT id_transaksi FROM outbox
            WHERE dikirim_pada < clock_timestamp() - make_interval(secs => :after_s)
            ORDER BY id_transaksi LIMIT :limit FOR UPDATE SKIP LOCKED))
        RETURNING id_transaksi)
    SELECT * FROM transaksi WHERE id = ANY (ARRAY(SELECT id_transaksi FROM marked)) ORDER BY id""")


def outbox_age(engine: Engine) -> float:
    """Age in seconds of the oldest movement that is not booked, 0 if all are."""
    return float(_rows(engine, _OUTBOX_AGE)[0].age_s)


def mark_lost(engine: Engine, after_s: float, limit: int) -> list[Movement]:
    """Mark up to `limit` movements last sent over `after_s` seconds ago as sent now. Returns them."""
    return [Movement(**row._mapping) for row in _rows(engine, _MARK_LOST, after_s=after_s, limit=limit)]
