"""The mutation book in PostgreSQL, and the operations on the stream."""

from collections.abc import Sequence
from typing import Any

from redis import Redis
from sqlalchemy import Engine, TextClause, text

STREAM = "mutasi"
DEAD_LETTER = f"{STREAM}:dead-letter"
MAX_DEAD_LETTERS = 10_000
BLOCK_MS = 500

COLUMNS = ("id_transaksi", "no_rekening", "tanggal_transaksi", "jenis_transaksi", "nominal")
_MESSAGES = f"""unnest(
    (:id_transaksi)::bigint[], (:no_rekening)::text[], (:tanggal_transaksi)::timestamptz[],
    (:jenis_transaksi)::jenis_transaksi[], (:nominal)::bigint[]) AS message ({", ".join(COLUMNS)})"""
# Sorted, so that two consumers with the same messages do not deadlock.
_INSERT = text(f"""
    INSERT INTO mutasi ({", ".join(COLUMNS)}) SELECT * FROM {_MESSAGES} ORDER BY id_transaksi
    ON CONFLICT DO NOTHING RETURNING id_transaksi, no_rekening, jenis_transaksi, nominal""")
_FIND = text(f"""
    SELECT id_transaksi, no_rekening, jenis_transaksi, nominal
    FROM mutasi JOIN {_MESSAGES} USING ({", ".join(COLUMNS)})""")

Rows = Sequence[dict[str, str]]
Facts = tuple[int, str, str, int]  # id_transaksi, no_rekening, jenis_transaksi, nominal


def insert_mutations(engine: Engine, rows: Rows) -> set[Facts]:
    """Store movements in one transaction. Returns those that were not stored before."""
    return _execute(engine, _INSERT, rows)


def find_mutations(engine: Engine, rows: Rows) -> set[Facts]:
    """Those of these movements that are in the mutation book with exactly these values."""
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
        # Always from 0: an entry that failed before would otherwise never be read again.
        reply: Any = self._redis.xread({STREAM: 0}, count=count, block=BLOCK_MS)
        return [entry for _, entries in reply for entry in entries]

    def delete(self, entries: Sequence[bytes]) -> None:
        """Delete entries once their movements are stored."""
        if entries:
            self._redis.xdel(STREAM, *entries)

    def set_aside(self, entry: bytes, fields: dict[bytes, bytes], reason: str) -> None:
        """Move an entry to the dead letters, with the reason: both or neither."""
        letter: dict[Any, Any] = fields | {b"reason": reason, b"entry": entry}
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.xadd(DEAD_LETTER, letter, maxlen=MAX_DEAD_LETTERS)
            pipe.xdel(STREAM, entry)
            pipe.execute()
