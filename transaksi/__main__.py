"""Start service transaksi: arguments, wiring, then the HTTP server."""

import asyncio
import gc
import logging
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from common.config import Parser, whole
from common.connections import Outage, open_redis
from common.telemetry import flush
from transaksi.api import OPEN_PATHS, Gate, on_http_exception, router
from transaksi.datastore import Database
from transaksi.pin import PinCheck
from transaksi.relay import Relay
from transaksi.teller import Teller

log = logging.getLogger("transaksi")

MAX_HEAD = 65_536
NO_METRICS = {"operation_spans": False, "metrics": False, "logs": False}


def read_settings() -> Namespace:
    parser = Parser("transaksi", "Deposits and withdrawals over HTTP.")
    option = parser.option
    option("--host", "127.0.0.1", "address to listen on")
    option("--port", 8000, "port to listen on", whole(1, 65_535))
    option("--workers", 1, "processes", whole(1, 64))
    option("--auth-cache-ttl", 300, "seconds a right PIN is remembered, 0 = not at all", whole(0, 3600))
    option("--max-pin-failures", 5, "PIN failures in a row that lock an account", whole(3, 1_000_000))
    option("--lock-minutes", 15, "minutes an account stays locked", whole(1, 10_000))
    option("--request-timeout", 5, "seconds after which a request is answered at the latest", whole(1, 60))
    option(
        "--max-queue", 1000, "requests that may wait in a process; the surplus gets 503", whole(1, 100_000)
    )
    option("--max-stream", 100_000, "stream entries past which movements wait in PostgreSQL", whole(1, 10**7))
    option(
        "--resend-after",
        10,
        "seconds; a movement not booked after twice as many is sent again",
        whole(1, 3600),
    )
    return parser.settings()


def create_app() -> FastAPI:
    """Wire up one process; uvicorn calls this in each."""
    settings = read_settings()
    postgres = Outage("PostgreSQL")
    redis = open_redis(settings)
    relay = Relay(Database(settings, 1), postgres, redis, settings.max_stream, settings.resend_after)
    # No ping before each batch: the teller retries on a stale connection itself.
    teller = Teller(Database(settings, 1, ping=False), postgres, settings.max_queue, relay.hand_over)
    # bcrypt has a thread per core, and less CPU than the customers who are in.
    database = Database(settings, os.cpu_count() or 1, nice=10)
    pins = PinCheck(database, settings.auth_cache_ttl, settings.max_pin_failures, settings.lock_minutes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(relay.watch())
        yield
        watch.cancel()
        await teller.close()
        await relay.close()
        end()

    app = FastAPIOffline(
        title="transaksi",
        version="2.0.0",
        description="Deposits and withdrawals of a tiny savings bank. Amounts are whole rupiah.",
        routes=router.routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: on_http_exception},
        redoc_url=None,
        redirect_slashes=False,
        telemetry=NO_METRICS | {"exclude": lambda scope: scope.get("path") in OPEN_PATHS},
    )
    app.add_middleware(Gate, pins=pins, time_limit_s=settings.request_timeout)
    app.state.teller, app.state.reads, app.state.health = teller, Database(settings, 2), None
    # The garbage collector need not read all modules again and again: a quarter of a request's CPU.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    return app


def end() -> None:
    """End the process. Python's own exit would wait for its threads: for a database that hangs."""
    log.info("stopped")
    flush()
    os._exit(0)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP with a bound on a request's head, which it lacks: anyone could fill the memory."""

    _unread = 0  # bytes since the last complete head or piece of a payload

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


def main() -> None:
    settings = read_settings()
    log.info("starting", extra=settings.options)
    config = uvicorn.Config(
        "transaksi.__main__:create_app",
        factory=True,
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
    sockets = [config.bind_socket()]
    if settings.workers == 1:
        uvicorn.Server(config).run(sockets)
    else:
        Multiprocess(config, sockets).run()
        end()


if __name__ == "__main__":
    main()
