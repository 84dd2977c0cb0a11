"""Start service mutasi: arguments, wiring, then the loop."""

import logging
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from common.config import Settings, option, read_settings, whole
from common.connections import open_postgres, open_redis
from mutasi.api import consume
from mutasi.datastore import Stream

log = logging.getLogger("mutasi")

ALIVE = Path(tempfile.gettempdir(), "mutasi.alive")


@dataclass(frozen=True, kw_only=True)
class MutasiSettings(Settings):
    batch_size: int = option(1000, whole(1, 10_000), "stream entries stored in one transaction")


def main() -> None:
    settings = read_settings(MutasiSettings, "mutasi", "Stores every accepted movement once.")
    log.info("starting", extra=settings.options())
    engine = open_postgres(settings, statement_timeout=10_000, idle_in_transaction_session_timeout=10_000)
    stream = Stream(open_redis(settings))
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    log.info("started")
    consume(engine, stream, settings.batch_size, stopping, ALIVE)
    log.info("stopped")


if __name__ == "__main__":
    main()
