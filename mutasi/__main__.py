"""Start service mutasi: arguments, wiring, then the loop."""

import logging
import signal
from threading import Event, Thread

from common.config import read_settings, whole
from common.connections import open_engine, open_redis
from common.telemetry import end_process
from mutasi.api import consume

log = logging.getLogger("mutasi")

OPTIONS = [("--batch-size", 1000, whole(1, 10_000), "stream entries stored in one transaction")]


def main() -> None:
    settings = read_settings("mutasi", "Stores every accepted movement once.", OPTIONS)
    log.info("starting", extra=vars(settings))
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # for sigwait
    stopping = Event()
    loop = (open_engine(settings), open_redis(settings), settings.batch_size, stopping)
    # In a thread, since a signal would not interrupt a call of libpq to a database that hangs.
    thread = Thread(target=consume, args=loop, daemon=True)
    thread.start()
    log.info("started")
    signal.sigwait(signals)
    stopping.set()
    thread.join(2)
    log.info("stopped")
    end_process()


if __name__ == "__main__":
    main()
