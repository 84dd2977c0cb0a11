"""Start service mutasi: options, wiring, then the loop."""

import signal
from threading import Event

from common.config import Settings, new_parser, read_settings
from common.connections import open_engine, open_redis
from common.telemetry import log, start_logging
from mutasi.api import consume


def main() -> None:
    settings = Settings()
    read_settings(new_parser("mutasi", "Books every accepted movement once."), settings)
    start_logging("mutasi", settings)
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    log.info("started")
    consume(open_engine(settings), open_redis(settings), stopping)
    log.info("stopped")


if __name__ == "__main__":
    main()
