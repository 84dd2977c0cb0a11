"""The mutation book in PostgreSQL, and the operations on the stream."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, get_args

from redis import Redis
from sqlalchemy import BigInteger, Engine, Text, TextClause, func, text
from sqlalchemy.dialects.postgresql import ENUM, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

STREAM = "mutasi"
DEAD_LETTER = f"{STREAM}:dead-letter"
MAX_DEAD_LETTERS = 10_000
BLOCK_MS = 500

JenisTransaksi = Literal["tabung", "tarik"]


class Base(DeclarativeBase):
    pass


class Mutasi(Base):
    """The mutation book: one row per movement, append-only. The database checks it against the journal."""

    __tablename__ = "mutasi"
    id_transaksi: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    no_rekening: Mapped[str] = mapped_column(Text)
    tanggal_transaksi: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True))
    jenis_transaksi: Mapped[JenisTransaksi] = mapped_column(
        ENUM(*get_args(JenisTransaksi), name="jenis_transaksi")
    )
    nominal: Mapped[int] = mapped_column(BigInteger)
    dicatat_pada: Mapped[datetime] = mapped_column(
        TIMESTAMP(timezone=True), server_default=func.clock_timestamp()
    )


COLUMNS = ("id_transaksi", "no_rekening", "tanggal_transaksi", "jenis_transaksi", "nominal")
_MESSAGES = """unnest(
    (:id_transaksi)::bigint[], (:no_rekening)::text[], (:tanggal_transaksi)::timestamptz[],
    (:jenis_transaksi)::jenis_transaksi[], (:nominal)::bigint[]
) AS message (id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal)"""
# Sorted, so that two consumers with the same messages do not deadlock.
_INSERT = text(f"""
    INSERT INTO mutasi (id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal)
    SELECT * FROM {_MESSAGES} ORDER BY id_transaksi
    ON CONFLICT DO NOTHING RETURNING id_transaksi, no_rekening, jenis_transaksi, nominal""")
_FIND = text(f"""
    SELECT id_transaksi, no_rekening, jenis_transaksi, nominal FROM mutasi
    JOIN {_MESSAGES} USING (id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal)""")

Rows = Sequence[dict[str, str]]
Facts = tuple[int, str, str, int]  # id_transaksi, no_rekening, jenis_transaksi, nominal


def insert_mutations(engine: Engine, rows: Rows) -> set[Facts]:
    """Store movements in one transaction. Returns those that were not stored before."""
    return _execute(engine, _INSERT, rows)


def find_mutations(engine: Engine, rows: Rows) -> set[Facts]:
    """Those of these movements that are in the mutation book exactly so."""
    return _execute(engine, _FIND, rows)


def _execute(engine: Engine, statement: TextClause, rows: Rows) -> set[Facts]:
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    with engine.begin() as connection:
        return {(*row,) for row in connection.execute(statement, columns)}


class Stream:
    """The stream holds only what is not stored yet: what was stored is deleted."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def read(self, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Up to `count` of the oldest entries, id and fields; waits half a second for the first."""
        # From 0, never from the last id read: an entry left behind would be stranded.
        reply: Any = self._redis.xread({STREAM: 0}, count=count, block=BLOCK_MS)
        return [entry for _, entries in reply for entry in entries]

    def delete(self, entries: Sequence[bytes]) -> None:
        """Delete entries once their movements are stored."""
        self._redis.xdel(STREAM, *entries)

    def set_aside(self, entry: bytes, fields: dict[bytes, bytes], reason: str) -> None:
        """Move an entry to the dead letters, with the reason: both or neither."""
        letter: dict[Any, Any] = fields | {b"reason": reason, b"entry": entry}
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.xadd(DEAD_LETTER, letter, maxlen=MAX_DEAD_LETTERS)
            pipe.xdel(STREAM, entry)
            pipe.execute()
