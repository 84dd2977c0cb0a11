"""The incoming edge: a plain blocking XREAD loop, and the dead letters."""

import tempfile
from collections.abc import Sequence
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
from mutasi.app import Message, book_messages

MAX_DEAD_LETTERS = 10_000
BATCH = 1000
BLOCK_MS = 500


class HealthFile:
    """A file that shows when both servers were last reached, in a directory of its own."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._failed = False

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


def process(engine: Engine, redis: Redis, messages: Sequence[Message]) -> None:
    """Book messages, delete them from the stream, then move the bad ones aside.

    In this order, because in a full Redis only the deletion makes room for dead letters.
    After a crash in between, messages are redelivered and ignored as duplicates.
    """
    bad = book_messages(engine, messages)
    if stored := [message.entry_id for message in messages if message not in bad]:
        redis.xdel(STREAM, *stored)
    for message, reason in bad.items():
        move_to_dead_letters(redis, message, reason)
    log.debug("batch processed", stored=len(stored), bad=len(bad))


def read_messages(redis: Redis) -> list[Message]:
    """Read the oldest entries of the stream; wait half a second for the first.

    Always from 0: what was processed is deleted, so an entry that is still there was not.
    """
    reply: Any = redis.xread({STREAM: 0}, count=BATCH, block=BLOCK_MS)
    return [Message(entry_id, fields) for _, entries in reply for entry_id, fields in entries]


def move_to_dead_letters(redis: Redis, message: Message, reason: str) -> None:
    """Copy a bad message to the dead letters, then delete it.

    It is deleted even if Redis refuses the copy, for example because it is full: every true
    movement is in the outbox, and bad messages must not block the stream.
    """
    letter: dict[Any, Any] = message.fields | {
        b"reason": reason,
        b"entry": message.entry_id,
    }
    kept = False
    with suppress(ResponseError):
        redis.xadd(DEAD_LETTERS, letter, maxlen=MAX_DEAD_LETTERS)
        kept = True
    redis.xdel(STREAM, message.entry_id)
    log.error(
        "bad message",
        entry=message.entry_id.decode(),
        reason=reason,
        dead_letter=kept,
    )
