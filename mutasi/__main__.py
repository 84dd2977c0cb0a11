"""Start service mutasi: options, wiring, then the loop."""

import signal
from threading import Event

from common.config import (
    Settings,
    development_passwords,
    new_parser,
    read_settings,
)
from common.connections import open_engine, open_redis
from common.telemetry import log, start_logging
from mutasi.api import consume


def main() -> None:
    parser = new_parser("mutasi", "Books every accepted movement once.")
    settings = read_settings(parser, Settings())
    start_logging("mutasi", settings.log_level)
    log.info("starting", **vars(settings))
    for name in development_passwords():
        log.warning("development password in use", variable=name)
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    log.info("started")
    consume(open_engine(settings), open_redis(settings), stopping)
    log.info("stopped")


if __name__ == "__main__":
    main()
