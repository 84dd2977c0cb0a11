"""The mutation book in PostgreSQL, and the operations on the stream."""

import json
from collections.abc import Sequence
from typing import Any

from redis import Redis
from sqlalchemy import Engine, Row, text

STREAM = "mutasi"  # holds only what is not stored yet: what was stored is deleted
DEAD_LETTER = f"{STREAM}:dead-letter"
MAX_DEAD_LETTERS = 10_000
BLOCK_MS = 500

FIELDS = {
    b"id_transaksi",
    b"no_rekening",
    b"tanggal_transaksi",
    b"jenis_transaksi",
    b"nominal",
    b"traceparent",
}
Message = tuple[bytes, dict[bytes, bytes]]  # a stream entry: its id, and its fields as they came

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
    SELECT DISTINCT ON (id_transaksi) id_transaksi, no_rekening, jenis_transaksi, nominal, traceparent
    FROM message JOIN stored USING (id_transaksi)""")


def insert_mutations(engine: Engine, messages: list[Message]) -> Sequence[Row[Any]]:
    """Store movements in one transaction. Returns those that were not stored before, in order of id."""
    # Bounded, as anything may stand in the stream. latin-1 takes all bytes; a true message is ASCII.
    rows = [{f.decode(): m[f][:100].decode("latin-1") for f in FIELDS & m.keys()} for _, m in messages]
    with engine.begin() as connection:
        return connection.execute(_INSERT, {"messages": json.dumps(rows)}).all()


def read_entries(redis: Redis, count: int) -> list[Message]:
    """Up to `count` of the oldest entries of the stream; waits half a second for the first."""
    # Always from 0: an entry that failed before would otherwise never be read again.
    reply: Any = redis.xread({STREAM: 0}, count=count, block=BLOCK_MS)
    return [entry for _, entries in reply for entry in entries]


def delete_entries(redis: Redis, messages: list[Message]) -> None:
    """Delete entries once their movements are stored."""
    redis.xdel(STREAM, *(entry for entry, _ in messages))


def set_aside(redis: Redis, message: Message, reason: str) -> None:
    """Copy an entry to the dead letters, with the reason, then delete it."""
    entry, fields = message
    letter: dict[Any, Any] = fields | {b"reason": reason, b"entry": entry}
    redis.xadd(DEAD_LETTER, letter, maxlen=MAX_DEAD_LETTERS)
    redis.xdel(STREAM, entry)
