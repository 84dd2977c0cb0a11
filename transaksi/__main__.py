"""Start service transaksi: arguments, logging, then the HTTP server."""

import logging
import signal
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from servers import open_postgres, open_redis, wait_for
from settings import Parser, Settings, spare_gc, whole
from transaksi.api import create_app
from transaksi.pin import THREADS, PinCheck
from transaksi.relay import Relay
from transaksi.teller import Teller

log = logging.getLogger("transaksi")

MAX_HEAD = 65_536


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP with a bound on a request's head, which it lacks: anyone could fill the memory."""

    _unread = 0  # bytes since the last head or piece of a payload was whole

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("Request head too large.")

    def on_headers_complete(self) -> None:
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)


class TransaksiSettings(Settings):
    host: str
    port: int
    workers: int
    auth_cache_ttl: int
    max_pin_failures: int
    lock_minutes: int
    request_timeout: int
    max_queue: int
    max_stream: int
    reconcile_after: int


def read_settings() -> TransaksiSettings:
    parser = Parser("transaksi", "Deposits and withdrawals over HTTP.")
    option = parser.option
    option("--host", str, "127.0.0.1", "address to listen on")
    option("--port", whole(1, 65535), 8000, "port to listen on")
    option("--workers", whole(1, 64), 1, "processes")
    option("--auth-cache-ttl", whole(0, 3600), 60, "seconds a right PIN is remembered, 0 = not at all")
    option("--max-pin-failures", whole(1, 1_000_000), 5, "wrong PINs in a row that lock an account")
    option("--lock-minutes", whole(1, 10_000), 15, "minutes an account stays locked")
    option("--request-timeout", whole(1, 60), 5, "seconds after which a request is answered at the latest")
    option("--max-queue", whole(1, 100_000), 1000, "requests that may wait in a process, the surplus gets 503")
    option("--max-stream", whole(1, 10_000_000), 100_000, "stream entries past which movements wait in PostgreSQL")
    option("--reconcile-after", whole(2, 86_400), 60, "seconds after which a movement without mutation is sent again")
    return parser.settings(TransaksiSettings())


def build(settings: TransaksiSettings) -> FastAPI:
    """Wire up one process."""
    timeout_ms = settings.request_timeout * 1000
    limits = {
        "statement_timeout": timeout_ms,
        "lock_timeout": timeout_ms // 2,
        "idle_in_transaction_session_timeout": 2 * timeout_ms,
        # A movement must be there, or never come, before the reconcile takes its id as settled.
        "transaction_timeout": settings.reconcile_after * 500,
    }
    engine = open_postgres(settings, pool_size=1 + THREADS, **limits)  # teller, PIN checks
    # What the relay has deleted may come back after a crash: it is only sent again. So no wait for the disk.
    relay_engine = open_postgres(settings, pool_size=1, synchronous_commit="off", **limits)
    relay = Relay(relay_engine, open_redis(settings), settings.max_stream, settings.reconcile_after)
    teller = Teller(engine, settings.max_queue, committed=relay.wake)
    pin = PinCheck(engine, settings.auth_cache_ttl, settings.max_pin_failures, settings.lock_minutes)
    app = create_app(teller, relay, pin, settings.request_timeout)
    spare_gc()
    return app


def worker() -> FastAPI:
    """What uvicorn calls in each process of several."""
    return build(read_settings())


def main() -> None:
    settings = read_settings()
    log.info("starting", extra=settings.shown())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a container's process 1 has no such default
    wait_for("PostgreSQL", lambda: open_postgres(settings, pool_size=1).connect().close())
    config = uvicorn.Config(
        build(settings) if settings.workers == 1 else "transaksi.__main__:worker",
        factory=settings.workers > 1,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        log_config=None,
        access_log=False,  # our own lines say more
        http="transaksi.__main__:BoundedHttp",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,  # for a client that never ends its request
    )
    # uvicorn raises the signal that stopped it once more: having stopped in good order is exit status 0.
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: None)
    server, sockets = uvicorn.Server(config), [config.bind_socket()]
    if settings.workers == 1:
        server.run(sockets)
    else:
        Multiprocess(config, sockets).run()
    log.info("stopped")


if __name__ == "__main__":
    main()
