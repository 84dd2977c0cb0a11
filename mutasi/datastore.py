"""The mutation book in PostgreSQL, and the operations on the stream."""

import json
from typing import Any, NamedTuple

from redis import Redis
from sqlalchemy import Engine, text

STREAM = "mutasi"
DEAD_LETTER = f"{STREAM}:dead-letter"
MAX_DEAD_LETTERS = 10_000
BLOCK_MS = 500

# Sorted, so that two consumers with the same messages do not deadlock.
_INSERT = text("""
    INSERT INTO mutasi (id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal)
    SELECT id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal
    FROM json_populate_recordset(NULL::mutasi, :messages) ORDER BY id_transaksi
    ON CONFLICT DO NOTHING RETURNING id_transaksi""")


class Message(NamedTuple):
    """A stream entry: its id, and its fields as they came."""

    entry: bytes
    fields: dict[bytes, bytes]


def insert_mutations(engine: Engine, messages: list[Message]) -> set[int]:
    """Store movements in one transaction. Returns the ids of those that were not stored before."""
    rows = [{name.decode(): value.decode() for name, value in m.fields.items()} for m in messages]
    with engine.begin() as connection:
        return set(connection.scalars(_INSERT, {"messages": json.dumps(rows)}))


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
