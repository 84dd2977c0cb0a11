"""The incoming edge: the plain blocking XREAD loop."""

import logging
import tempfile
from pathlib import Path
from threading import Event

from redis import Redis
from sqlalchemy import Engine

from mutasi.app import process
from mutasi.datastore import read_entries

log = logging.getLogger(__name__)

ALIVE = Path(tempfile.gettempdir(), "mutasi.alive")


def consume(engine: Engine, redis: Redis, batch_size: int, stopping: Event) -> None:
    """Process what the stream brings until `stopping`; touches `ALIVE` each turn, for the health check.

    Retries with a growing pause, for example while a server is away: the entries stay in the stream.
    """
    pause_s = 0.0
    while not stopping.wait(pause_s):
        try:
            ALIVE.touch()
            if messages := read_entries(redis, batch_size):
                process(engine, redis, messages)
            pause_s = 0.0
        except Exception:
            log.exception("processing failed")
            pause_s = min(pause_s + 0.25, 5.0)
