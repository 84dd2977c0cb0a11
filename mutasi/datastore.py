"""The mutation book in PostgreSQL, and the stream's own operations."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from redis import Redis
from sqlalchemy import ARRAY, BigInteger, Engine, Text, bindparam, func, select
from sqlalchemy.dialects.postgresql import ENUM, TIMESTAMP, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

from servers import STREAM

DEAD_LETTER = f"{STREAM}:dead-letter"
MAX_DEAD_LETTERS = 10_000
BLOCK_MS = 1000

Jenis = Literal["tabung", "tarik"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A stream entry as it came: bytes that may be anything."""

    id: bytes
    fields: dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Pesan:
    """A valid message: one accepted movement of `nominal` whole rupiah."""

    entry: Entry
    id_transaksi: int
    tanggal_transaksi: datetime
    no_rekening: str
    jenis_transaksi: str
    nominal: int
    traceparent: str | None


class Base(DeclarativeBase):
    pass


class Mutasi(Base):
    """The mutation book: one row per movement, append-only. init.sql has its reference to the journal, which is
    the other service's table."""

    __tablename__ = "mutasi"
    id_transaksi: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    no_rekening: Mapped[str] = mapped_column(Text)
    tanggal_transaksi: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True))
    jenis_transaksi: Mapped[Jenis] = mapped_column(ENUM(*get_args(Jenis), name="jenis_transaksi"))
    nominal: Mapped[int] = mapped_column(BigInteger)
    dicatat_pada: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True), server_default=func.clock_timestamp())


_COLUMNS: dict[str, TypeEngine[Any]] = {
    "id_transaksi": BigInteger(),
    "no_rekening": Text(),
    "tanggal_transaksi": TIMESTAMP(timezone=True),
    "jenis_transaksi": Mutasi.jenis_transaksi.type,
    "nominal": BigInteger(),
}
_rows = (
    func.unnest(*(bindparam(f"all_{name}", type_=ARRAY(kind)) for name, kind in _COLUMNS.items()))
    .table_valued(*_COLUMNS)
    .render_derived(name="baris")
)
_INSERT = (
    insert(Mutasi)
    .from_select(
        list(_COLUMNS),
        select(*_rows.c).order_by(_rows.c.id_transaksi),  # in one order always: two consumers must not deadlock
    )
    .on_conflict_do_nothing(index_elements=[Mutasi.id_transaksi])
    .returning(Mutasi.id_transaksi)
)


def insert_mutasi(engine: Engine, pesan: Sequence[Pesan]) -> set[int]:
    """Store movements in one transaction; the ids of those that were not there yet."""
    columns = {f"all_{name}": [getattr(p, name) for p in pesan] for name in _COLUMNS}
    with engine.begin() as connection:
        return set(connection.scalars(_INSERT, columns))


class Stream:
    """The stream holds unprocessed work only: what was stored is deleted, and reading starts at its head."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def read(self, count: int) -> list[Entry]:
        """Up to `count` of the oldest entries; waits a second for the first."""
        # From 0, never from the last id read: an entry left behind would be stranded.
        reply: Any = self._redis.xread({STREAM: 0}, count=count, block=BLOCK_MS)
        return [Entry(*entry) for _, entries in reply for entry in entries]

    def delete(self, entries: Sequence[Entry]) -> None:
        """Take entries out, once what they say is stored."""
        self._redis.xdel(STREAM, *(entry.id for entry in entries))

    def set_aside(self, entry: Entry, reason: str) -> None:
        """Move an entry to the dead letters, with the reason: both or neither."""
        with self._redis.pipeline(transaction=True) as pipe:
            letter: dict[Any, Any] = entry.fields | {b"reason": reason, b"entry": entry.id}
            pipe.xadd(DEAD_LETTER, letter, maxlen=MAX_DEAD_LETTERS)
            pipe.xdel(STREAM, entry.id)
            pipe.execute()
