"""Start service transaksi: options, wiring, then the HTTP server."""

import asyncio
import gc
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from fastapi_offline import FastAPIOffline
from redis import Redis
from sqlalchemy import Engine
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware

from common.config import PORT, Settings, int_range, new_parser, read_settings
from common.connections import open_redis
from common.stream import DEAD_LETTERS, STREAM
from common.telemetry import add_gauge, log, start_logging
from transaksi import datastore
from transaksi.api import HANDLERS, OPEN_PATHS, router
from transaksi.app import Bank, PinCheck, Teller
from transaksi.datastore import Database
from transaksi.middleware import (
    BasicAuthentication,
    PayloadLimit,
    RequestLog,
    refuse_authentication,
)
from transaksi.protocol import MAX_CONNECTIONS, BoundedHttp
from transaksi.stream import Stream

# One span for each request. FastAPI makes no log records of its own: those come from structlog.
TELEMETRY: TelemetryConfig = {
    "operation_spans": False,
    "logs": False,
    "exclude": lambda scope: scope.get("path") in OPEN_PATHS,
}

# A check on every core, and one more that waits for PostgreSQL. Each has a connection.
PIN_THREADS = min((os.cpu_count() or 1) + 1, 16)


class TransaksiSettings(Settings):
    """What service transaksi is told by arguments."""

    host: str
    port: int
    auth_cache_ttl: int
    max_pin_failures: int
    lock_minutes: int
    request_timeout: int
    resend_after: int


def create_app(settings: TransaksiSettings) -> FastAPI:
    """Wire up the service."""
    redis = open_redis(settings)
    stream_database = Database(settings, threads=1)
    stream = Stream(stream_database, redis, settings.resend_after)
    teller = Teller(Database(settings, threads=1), on_commit=stream.hand_over)
    pin_database = Database(settings, PIN_THREADS, nice=10)  # bcrypt shall not slow others
    pins = PinCheck(
        pin_database,
        max_failures=settings.max_pin_failures,
        lock_minutes=settings.lock_minutes,
        cache_ttl_s=settings.auth_cache_ttl,
    )
    reads = Database(settings, threads=1)  # more would slow deposits
    health = Database(settings, threads=1)
    bank = Bank(teller, pins, reads, health)
    add_gauges(teller, stream_database.engine, redis)

    app = FastAPIOffline(
        title="transaksi",
        version="3.0.0",
        description="Deposits and withdrawals of a tiny savings bank, in whole rupiah.",
        routes=router.routes,
        lifespan=lambda _: background(teller, stream, pin_database),
        middleware=[
            Middleware(RequestLog, timeout_s=settings.request_timeout),
            Middleware(
                AuthenticationMiddleware,
                backend=BasicAuthentication(bank),
                on_error=refuse_authentication,
            ),
            Middleware(PayloadLimit),
        ],
        exception_handlers=HANDLERS,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=TELEMETRY,
    )
    app.state.bank = bank
    return app


@asynccontextmanager
async def background(teller: Teller, stream: Stream, pin_database: Database) -> AsyncIterator[None]:
    """Run the teller and the stream while requests are served."""
    loops = (teller.run(), stream.run(), stream.resend())
    tasks = [asyncio.create_task(loop) for loop in loops]
    for task in tasks:
        task.add_done_callback(stop_if_failed)
    log.info("started")
    yield
    # All requests have been answered.
    for task in tasks:
        task.cancel()
    pin_database.close()
    await stream.close()
    log.info("stopped")


def add_gauges(teller: Teller, engine: Engine, redis: Redis) -> None:
    """Add what an operator can alarm on to the metrics."""
    add_gauge("tabungan.unbooked.age", "s", lambda: datastore.outbox_age(engine))
    add_gauge("tabungan.unbooked.count", "{movement}", lambda: datastore.outbox_count(engine))
    add_gauge("tabungan.stream.length", "{entry}", lambda: redis.xlen(STREAM))
    add_gauge("tabungan.dead_letters", "{entry}", lambda: redis.xlen(DEAD_LETTERS))
    add_gauge("tabungan.waiting", "{request}", teller.waiting)


def stop_if_failed(task: asyncio.Task[None]) -> None:
    """Stop the process if one of its tasks has failed: it must not look healthy."""
    try:
        task.result()
    except asyncio.CancelledError:
        pass
    except Exception:
        log.critical("a task failed", exc_info=True)
        signal.raise_signal(signal.SIGTERM)


def new_transaksi_parser() -> ArgumentParser:
    parser = new_parser("transaksi", "Deposits and withdrawals over HTTP.")

    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", default=8000, type=PORT, help="port to listen on")
    for name, default, low, high, text in (
        ("--auth-cache-ttl", 300, 0, 3600, "seconds a correct PIN is cached, 0 = not at all"),
        ("--max-pin-failures", 5, 3, 10**6, "PIN failures in a row that lock an account"),
        ("--lock-minutes", 15, 1, 10**4, "minutes an account stays locked"),
        ("--request-timeout", 5, 1, 60, "request timeout in seconds"),
        ("--resend-after", 10, 1, 3600, "N: a movement not booked after 2N seconds is resent"),
    ):
        parser.add_argument(name, default=default, type=int_range(low, high), help=text)
    return parser


def main() -> None:
    settings = TransaksiSettings()
    read_settings(new_transaksi_parser(), settings)
    start_logging("transaksi", settings)
    app = create_app(settings)
    BoundedHttp.head_timeout_s = settings.request_timeout
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedHttp,
        ws="none",
        log_config=None,
        access_log=False,  # the request log says more
        server_header=False,
        proxy_headers=False,
        backlog=MAX_CONNECTIONS,
        timeout_keep_alive=75,  # longer than the pauses of clients and proxies
        timeout_graceful_shutdown=settings.request_timeout + 1,
    )
    # uvicorn raises the signal again when it has stopped: then the exit status shall be 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())
    # Collect garbage less often, and not in the loaded modules.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
