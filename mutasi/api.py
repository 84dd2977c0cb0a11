"""Input: a plain blocking XREAD loop, and the dead letters."""

import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError
from sqlalchemy import Engine

from common.stream import DEAD_LETTERS, STREAM
from common.telemetry import log
from mutasi import datastore
from mutasi.app import Messages, book_messages

MAX_DEAD_LETTERS = 10_000
BATCH = 1000
BLOCK_MS = 500


class HealthFile:
    """A file that shows when PostgreSQL and Redis were last reached, in a directory of its own."""

    _path: Path | None = None
    _failed = False

    def touch(self) -> None:
        """Touch the file. A failure is logged once, and harms nothing but the health check."""
        try:
            self._path = self._path or Path(tempfile.mkdtemp(prefix="mutasi-"), "alive")
            self._path.touch()
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("no health file", reason=str(error))
            self._failed = True


def consume(engine: Engine, redis: Redis, stopping: Event) -> None:
    """Process what the stream brings until `stopping`.

    After an error it connects anew and tries again with a growing pause: the messages are
    still in the stream.
    """
    pause_s = 0.0
    health_file = HealthFile()
    while not stopping.wait(pause_s):
        try:
            if messages := read_messages(redis):
                process(engine, redis, messages)
            else:
                datastore.ping(engine)
            health_file.touch()
            pause_s = 0.0
        except Exception:
            log.exception("processing failed")
            redis.connection_pool.disconnect()
            pause_s = min(pause_s + 0.25, 5.0)


def process(engine: Engine, redis: Redis, messages: Messages) -> None:
    """Book messages, delete them from the stream, then move the bad ones aside.

    In this order, because in a full Redis only the deletion makes room for dead letters.
    After a crash in between, messages are redelivered and ignored as duplicates.
    """
    bad = book_messages(engine, messages)
    if stored := messages.keys() - bad.keys():
        redis.xdel(STREAM, *stored)
    for entry_id, reason in bad.items():
        move_to_dead_letters(redis, entry_id, messages[entry_id], reason)
    log.debug("batch processed", stored=len(stored), bad=len(bad))


def read_messages(redis: Redis) -> Messages:
    """Read the oldest entries of the stream; wait half a second for the first.

    Processed entries are deleted, so it always reads from the start of the stream.
    """
    reply: Any = redis.xread({STREAM: 0}, count=BATCH, block=BLOCK_MS)
    return {entry_id: fields for _, entries in reply for entry_id, fields in entries}


def move_to_dead_letters(
    redis: Redis, entry_id: bytes, fields: dict[bytes, bytes], reason: str
) -> None:
    """Copy a bad message to the dead letters, then delete it.

    It is deleted even if Redis refuses the copy, for example because it is full: every genuine
    movement is in the outbox, and bad messages must not block the stream.
    """
    letter: dict[Any, Any] = fields | {b"reason": reason, b"entry": entry_id}
    kept = False
    with suppress(ResponseError):
        redis.xadd(DEAD_LETTERS, letter, maxlen=MAX_DEAD_LETTERS)
        kept = True
    redis.xdel(STREAM, entry_id)
    log.error(
        "bad message",
        entry=entry_id.decode(),
        reason=reason,
        dead_letter=kept,
    )
