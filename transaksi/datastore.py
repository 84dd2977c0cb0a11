"""The tables of service transaksi and its few database operations.

The mapped classes are the schema's face (init.sql makes it). The operations use the same tables through SQLAlchemy
Core, or SQL where that reads better, many rows a statement: the unit of work costs twice as much on the hot path.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, get_args

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Connection,
    ForeignKey,
    Identity,
    Interval,
    Row,
    Text,
    any_,
    bindparam,
    case,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ENUM, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from transaksi.app import Gerakan, Jenis, Kunci, Perintah

RECONCILE_WINDOW = 50_000
RECONCILE_LOCK = 7_282_001  # any number, the same for every relay


class Base(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own way
        int: BigInteger,
        str: Text,
        datetime: TIMESTAMP(timezone=True),
        Jenis: ENUM(*get_args(Jenis), name="jenis_transaksi"),
    }


class Rekening(Base):
    """Who, and the balance now."""

    __tablename__ = "rekening"
    no_rekening: Mapped[str] = mapped_column(primary_key=True)
    nama: Mapped[str]
    saldo: Mapped[int]
    dibuat_pada: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    kredensial: Mapped["Kredensial"] = relationship(back_populates="rekening")
    transaksi: Mapped[list["Transaksi"]] = relationship(back_populates="rekening", order_by="Transaksi.id")


class Kredensial(Base):
    """How the customer proves it."""

    __tablename__ = "kredensial"
    no_rekening: Mapped[str] = mapped_column(ForeignKey(Rekening.no_rekening), primary_key=True)
    pin_hash: Mapped[str]
    pin_gagal: Mapped[int]
    terkunci_sampai: Mapped[datetime | None]
    rekening: Mapped[Rekening] = relationship(back_populates="kredensial")


class Transaksi(Base):
    """The journal: one row per accepted movement, append-only."""

    __tablename__ = "transaksi"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    no_rekening: Mapped[str] = mapped_column(ForeignKey(Rekening.no_rekening))
    jenis_transaksi: Mapped[Jenis]
    nominal: Mapped[int]
    saldo_akhir: Mapped[int]
    tanggal_transaksi: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    idempotency_key: Mapped[str | None]
    rekening: Mapped[Rekening] = relationship(back_populates="transaksi")
    outbox: Mapped["Outbox | None"] = relationship(back_populates="transaksi")


class Outbox(Base):
    """A movement not yet handed to the stream."""

    __tablename__ = "outbox"
    id_transaksi: Mapped[int] = mapped_column(ForeignKey(Transaksi.id), primary_key=True)
    traceparent: Mapped[str | None]
    transaksi: Mapped[Transaksi] = relationship(back_populates="outbox")


# ---------------------------------------------------------------- teller

_LOCK = (
    select(Rekening.no_rekening, Rekening.saldo)
    .where(Rekening.no_rekening == any_(bindparam("semua", type_=ARRAY(Text))))
    .order_by(Rekening.no_rekening)  # the one order in which all tellers lock: no deadlock
    .with_for_update(key_share=True)  # FOR NO KEY UPDATE, as the balance's own update: foreign keys may go on reading
)
_FIND_KEYS = text("""
    SELECT id, no_rekening, idempotency_key, jenis_transaksi, nominal, saldo_akhir
    FROM transaksi JOIN unnest(:no_rekening, :idempotency_key) AS dicari(no_rekening, idempotency_key)
    USING (no_rekening, idempotency_key)""")
# One statement, one round trip. The ids follow the order of the commands, and so do the traceparents.
_RECORD = text("""
    WITH tercatat AS (
        INSERT INTO transaksi (no_rekening, jenis_transaksi, nominal, saldo_akhir, idempotency_key)
        SELECT no_rekening, jenis::jenis_transaksi, nominal, saldo_akhir, idempotency_key
        FROM unnest(:no_rekening, :jenis, (:nominal)::bigint[], (:saldo_akhir)::bigint[], (:idempotency_key)::text[])
            WITH ORDINALITY AS baris(no_rekening, jenis, nominal, saldo_akhir, idempotency_key, urutan)
        ORDER BY urutan RETURNING id),
    antre AS (
        INSERT INTO outbox (id_transaksi, traceparent)
        SELECT id, ((:traceparent)::text[])[row_number() OVER (ORDER BY id)] FROM tercatat),
    posisi AS (
        UPDATE rekening r SET saldo = baru.saldo
        FROM unnest(:rekening, (:saldo)::bigint[]) AS baru(no_rekening, saldo)
        WHERE r.no_rekening = baru.no_rekening)
    SELECT id FROM tercatat ORDER BY id""")


def lock_saldo(connection: Connection, no_rekening: Iterable[str]) -> dict[str, int]:
    """Lock these accounts' rows until the transaction ends; their balances, without those that do not exist."""
    return dict(connection.execute(_LOCK, {"semua": list(no_rekening)}).all())


def find_keys(connection: Connection, kunci: Sequence[Kunci]) -> dict[Kunci, Gerakan]:
    """The movements made under these (account, idempotency key) pairs.

    To be called when the accounts are locked, in a statement of its own: it then sees what was committed
    during the wait for the lock.
    """
    accounts, keys = zip(*kunci, strict=True)
    found = connection.execute(_FIND_KEYS, {"no_rekening": list(accounts), "idempotency_key": list(keys)})
    return {
        (row.no_rekening, row.idempotency_key): Gerakan(
            Perintah(row.jenis_transaksi, row.no_rekening, row.nominal, row.idempotency_key), row.saldo_akhir, row.id
        )
        for row in found
    }


def record(connection: Connection, gerakan: Sequence[Gerakan], saldo: dict[str, int]) -> None:
    """Write movements to balances, journal and outbox; sets their `id_transaksi`."""
    perintah = [g.perintah for g in gerakan]
    touched = {p.no_rekening: saldo[p.no_rekening] for p in perintah}
    ids = connection.scalars(
        _RECORD,
        {
            "no_rekening": [p.no_rekening for p in perintah],
            "jenis": [p.jenis_transaksi for p in perintah],
            "nominal": [p.nominal for p in perintah],
            "saldo_akhir": [g.saldo_akhir for g in gerakan],
            "idempotency_key": [p.idempotency_key for p in perintah],
            "traceparent": [p.traceparent for p in perintah],
            "rekening": list(touched),
            "saldo": list(touched.values()),
        },
    )
    for g, id_transaksi in zip(gerakan, ids, strict=True):
        g.id_transaksi = id_transaksi


# ---------------------------------------------------------------- PIN

_LOCKED = func.coalesce(Kredensial.terkunci_sampai > func.clock_timestamp(), False)
_KREDENSIAL = select(Kredensial.pin_hash, _LOCKED.label("terkunci")).where(Kredensial.no_rekening == bindparam("no"))
_PIN_RIGHT = (
    update(Kredensial)
    .where(Kredensial.no_rekening == bindparam("no"), ~_LOCKED)
    .values(pin_gagal=0, terkunci_sampai=None)
    .returning(Kredensial.no_rekening)
)
_PIN_WRONG = (
    update(Kredensial)
    .where(Kredensial.no_rekening == bindparam("no"), ~_LOCKED)
    .values(
        pin_gagal=Kredensial.pin_gagal + 1,
        terkunci_sampai=case(
            (
                Kredensial.pin_gagal + 1 >= bindparam("limit"),
                func.clock_timestamp() + bindparam("locked_for", type_=Interval),
            )
        ),
    )
    .returning(_LOCKED)
)


def find_kredensial(connection: Connection, no_rekening: str) -> Row[str, bool] | None:
    """`pin_hash` and whether the account is locked (`terkunci`) now; None for an unknown account."""
    return connection.execute(_KREDENSIAL, {"no": no_rekening}).one_or_none()


def pin_right(connection: Connection, no_rekening: str) -> bool:
    """Forget the failures; False where the account was locked in the meantime."""
    return connection.execute(_PIN_RIGHT, {"no": no_rekening}).one_or_none() is not None


def pin_wrong(connection: Connection, no_rekening: str, limit: int, locked_for: timedelta) -> bool:
    """Count a failure unless locked; from the `limit`-th in a row on it locks. True if it locked now."""
    parameters = {"no": no_rekening, "limit": limit, "locked_for": locked_for}
    return bool(connection.scalar(_PIN_WRONG, parameters))


# ---------------------------------------------------------------- relay

# MATERIALIZED, since the LIMIT beside SKIP LOCKED must hold under every plan; ARRAY and LATERAL ... LIMIT 1, since
# the planner must look up each id by index and not read the whole journal for a hash join.
_TAKE = text("""
    WITH diambil AS MATERIALIZED (
        SELECT id_transaksi FROM outbox ORDER BY id_transaksi LIMIT :limit FOR UPDATE SKIP LOCKED),
    dihapus AS (
        DELETE FROM outbox WHERE id_transaksi = ANY (ARRAY(SELECT id_transaksi FROM diambil))
        RETURNING id_transaksi, traceparent)
    SELECT d.id_transaksi, d.traceparent, t.*
    FROM dihapus d CROSS JOIN LATERAL (
        SELECT tanggal_transaksi, no_rekening, jenis_transaksi, nominal
        FROM transaksi WHERE id = d.id_transaksi LIMIT 1) t
    ORDER BY d.id_transaksi""")
_OUTBOX_AGE = text("""
    SELECT extract(epoch FROM clock_timestamp() - tanggal_transaksi)::float8
    FROM outbox JOIN transaksi ON id = id_transaksi ORDER BY id_transaksi LIMIT 1""")
# Up to the first row that is too young, not past it: times need not follow ids to the millisecond.
_RECONCILE = text("""
    WITH jendela AS MATERIALIZED (
        SELECT id, jenis_transaksi, nominal, tanggal_transaksi FROM transaksi WHERE id = ANY ((:missing)::bigint[])
        UNION ALL
        SELECT id, jenis_transaksi, nominal, tanggal_transaksi FROM (
            SELECT *, bool_and(tanggal_transaksi < now() - make_interval(secs => :after)) OVER (ORDER BY id) AS matang
            FROM (SELECT * FROM transaksi WHERE id > :checked ORDER BY id LIMIT :window) baru) baru
        WHERE matang),
    banding AS MATERIALIZED (
        SELECT id, m.id_transaksi IS NULL AS hilang, (m.jenis_transaksi, m.nominal, m.tanggal_transaksi)
            IS DISTINCT FROM (t.jenis_transaksi, t.nominal, t.tanggal_transaksi) AS beda
        FROM jendela t LEFT JOIN LATERAL (SELECT * FROM mutasi WHERE id_transaksi = t.id LIMIT 1) m ON true),
    kembali AS (
        INSERT INTO outbox (id_transaksi) SELECT id FROM banding WHERE hilang ORDER BY id
        ON CONFLICT DO NOTHING)
    SELECT greatest(max(id), :checked) AS checked, count(*) = :window + cardinality((:missing)::bigint[]) AS full,
        coalesce(array_agg(id ORDER BY id) FILTER (WHERE hilang), '{}') AS missing,
        coalesce(array_agg(id ORDER BY id) FILTER (WHERE beda AND NOT hilang), '{}') AS beda
    FROM banding""")


def take_outbox(connection: Connection, limit: int) -> Sequence[Row[Any]]:
    """Take up to `limit` movements out of the outbox, oldest first; a rollback puts them back."""
    return connection.execute(_TAKE, {"limit": limit}).all()


def outbox_age(connection: Connection) -> float:
    """Age in seconds of the oldest movement in the outbox, 0 where there is none."""
    return connection.scalar(_OUTBOX_AGE) or 0.0


def reconcile(connection: Connection, checked: int, missing: Sequence[int], after_s: int) -> Row[Any] | None:
    """Put movements without a mutation row back into the outbox; None while another relay is at it.

    Looks at those that were `missing`, and at a window of journal rows after id `checked` that are older than
    `after_s` seconds. Gives the new `checked` and `missing`, the ids whose mutation row says something else than the
    journal (`beda`), and whether the window was `full`.
    """
    if not connection.scalar(select(func.pg_try_advisory_xact_lock(RECONCILE_LOCK))):
        return None
    found = {"checked": checked, "missing": list(missing), "after": after_s, "window": RECONCILE_WINDOW}
    return connection.execute(_RECONCILE, found).one()
