"""The mutation book in PostgreSQL, and the operations on the stream."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis import Redis
from sqlalchemy import Engine, Row, text

STREAM = "mutasi"
DEAD_LETTER = f"{STREAM}:dead-letter"
MAX_DEAD_LETTERS = 10_000
BLOCK_MS = 500

# The book refers to the journal by all columns, so the database refuses every message that differs from it.
# Sorted, so that two consumers with the same messages do not deadlock.
_INSERT = text("""
    WITH message AS (
        SELECT * FROM json_to_recordset(:messages) AS message (
            id_transaksi bigint, no_rekening text, tanggal_transaksi timestamptz,
            jenis_transaksi jenis_transaksi, nominal bigint, traceparent text)),
    stored AS (
        INSERT INTO mutasi (id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal)
        SELECT id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal
        FROM message ORDER BY id_transaksi
        ON CONFLICT DO NOTHING RETURNING id_transaksi)
    SELECT DISTINCT ON (id_transaksi) * FROM message JOIN stored USING (id_transaksi)""")


class Message(NamedTuple):
    """A stream entry: its id, and its fields as they came."""

    entry: bytes
    fields: dict[bytes, bytes]


def insert_mutations(engine: Engine, messages: list[Message]) -> Sequence[Row[Any]]:
    """Store movements in one transaction. Returns those that were not stored before."""
    # latin-1 takes all bytes. No true message has others than ASCII, or a value of 100.
    rows = [{k.decode("latin-1"): v[:100].decode("latin-1") for k, v in m.fields.items()} for m in messages]
    with engine.begin() as connection:
        return connection.execute(_INSERT, {"messages": json.dumps(rows)}).all()


class Stream:
    """The stream holds only what is not stored yet: what was stored is deleted."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def read(self, count: int) -> list[Message]:
        """Up to `count` of the oldest entries; waits half a second for the first."""
        # Always from 0: an entry that failed before would otherwise never be read again.
        reply: Any = self._redis.xread({STREAM: 0}, count=count, block=BLOCK_MS)
        return [Message(*entry) for _, entries in reply for entry in entries]

    def delete(self, messages: list[Message]) -> None:
        """Delete entries once their movements are stored."""
        self._redis.xdel(STREAM, *(message.entry for message in messages))

    def set_aside(self, message: Message, reason: str) -> None:
        """Move an entry to the dead letters, with the reason: both or neither."""
        letter: dict[Any, Any] = message.fields | {b"reason": reason, b"entry": message.entry}
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.xadd(DEAD_LETTER, letter, maxlen=MAX_DEAD_LETTERS)
            pipe.xdel(STREAM, message.entry)
            pipe.execute()
