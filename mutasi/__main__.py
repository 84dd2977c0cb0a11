"""Start service mutasi: arguments, logging, then the loop."""

import logging
import signal
import sys
import tempfile
from pathlib import Path
from threading import Event

from mutasi.api import consume
from mutasi.datastore import Stream
from servers import open_postgres, open_redis, wait_for
from settings import Parser, Settings, spare_gc, whole

log = logging.getLogger("mutasi")

ALIVE = Path(tempfile.gettempdir(), "mutasi.alive")


class MutasiSettings(Settings):
    batch_size: int


def main() -> None:
    parser = Parser("mutasi", "Stores every accepted movement of service transaksi, once.")
    parser.option("--batch-size", whole(1, 10_000), 1000, "stream entries stored in one transaction")
    settings = parser.settings(MutasiSettings())
    log.info("starting", extra=settings.shown())
    engine = open_postgres(
        settings, pool_size=1, statement_timeout=10_000, lock_timeout=5_000, idle_in_transaction_session_timeout=10_000
    )
    redis = open_redis(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a container's process 1 has no such default
    wait_for("PostgreSQL", lambda: engine.connect().close())
    wait_for("Redis", redis.ping)
    stopping = Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: stopping.set())
    spare_gc()
    log.info("started")
    consume(engine, Stream(redis), settings.batch_size, stopping, ALIVE)
    log.info("stopped")


if __name__ == "__main__":
    main()
