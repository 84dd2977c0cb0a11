"""Start service mutasi: arguments, wiring, then the loop."""

import logging
import os
import signal
import tempfile
from pathlib import Path
from threading import Event

from common.config import read_settings, whole
from common.connections import open_postgres, open_redis
from common.telemetry import flush
from mutasi.api import consume
from mutasi.datastore import Stream

log = logging.getLogger("mutasi")

ALIVE = Path(tempfile.gettempdir(), "mutasi.alive")
OPTIONS = [("--batch-size", 1000, whole(1, 10_000), "stream entries stored in one transaction")]


def main() -> None:
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    settings = read_settings("mutasi", "Stores every accepted movement once.", OPTIONS)
    log.info("starting", extra=settings.options)
    engine = open_postgres(settings, statement_timeout=10_000, idle_in_transaction_session_timeout=10_000)
    log.info("started")
    consume(engine, Stream(open_redis(settings)), settings.batch_size, stopping, ALIVE)
    log.info("stopped")
    flush()
    os._exit(0)  # Python's own exit would wait for a reader of stdout that has stopped


if __name__ == "__main__":
    main()
