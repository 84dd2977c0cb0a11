"""Start service transaksi: arguments, wiring, then the HTTP server."""

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import uvicorn
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from uvicorn.supervisors import Multiprocess

from common.config import read_settings, whole
from common.connections import Database, open_redis
from common.telemetry import end_process
from transaksi.api import routes
from transaksi.middleware import HANDLERS, OPEN_PATHS, Gate
from transaksi.pin import PinCheck
from transaksi.protocol import BoundedHttp
from transaksi.relay import Relay
from transaksi.teller import Teller

log = logging.getLogger("transaksi")

OPTIONS = (
    ("--host", "127.0.0.1", str, "address to listen on"),
    ("--port", 8000, whole(1, 65_535), "port to listen on"),
    ("--workers", 1, whole(1, 64), "processes"),
    ("--auth-cache-ttl", 300, whole(0, 3600), "seconds a right PIN is remembered, 0 = not at all"),
    ("--max-pin-failures", 5, whole(3, 10**6), "PIN failures in a row that lock an account"),
    ("--lock-minutes", 15, whole(1, 10**4), "minutes an account stays locked"),
    ("--request-timeout", 5, whole(1, 60), "seconds after which a request is answered at the latest"),
    ("--max-queue", 1000, whole(1, 10**5), "requests that may wait in a process; the surplus gets 503"),
    ("--max-stream", 10**5, whole(1, 10**7), "stream entries; above this, movements wait in PostgreSQL"),
    ("--resend-after", 10, whole(1, 3600), "seconds; what is not booked after twice as many is sent again"),
)
TRACES_ONLY = {"operation_spans": False, "metrics": False, "logs": False}
settings = partial(read_settings, "transaksi", "Deposits and withdrawals over HTTP.", OPTIONS)


def create_app() -> FastAPI:
    """Wire up one process; uvicorn calls this in each."""
    s = settings()
    relay = Relay(Database(s, 1), open_redis(s), s.max_stream, s.resend_after)
    # No ping before each batch: the teller retries on a stale connection itself.
    teller = Teller(Database(s, 1, ping=False), s.max_queue, relay.hand_over)
    # A bcrypt thread per core, of low priority: checks do not slow down customers who are authenticated.
    pin_database = Database(s, max(1, (os.cpu_count() or 1) // s.workers), nice=10)
    pins = PinCheck(pin_database, s.auth_cache_ttl, s.max_pin_failures, s.lock_minutes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(relay.watch())
        yield
        watch.cancel()
        for part, limit_s in ((teller, 2), (relay, 1)):  # in this order: one hands over to the other
            if part.work:
                await asyncio.wait([part.work], timeout=limit_s)
        log.info("stopped")
        end_process()

    app = FastAPIOffline(
        title="transaksi",
        version="2.0.0",
        description="Deposits and withdrawals of a tiny savings bank. Amounts are whole rupiah.",
        routes=routes,
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=TRACES_ONLY | {"exclude": lambda scope: scope.get("path") in OPEN_PATHS},
    )
    app.add_middleware(Gate, pins=pins, time_limit_s=s.request_timeout)
    app.state.teller, app.state.reads, app.state.health = teller, Database(s, 2), None
    # Keep the loaded modules out of garbage collection, which took a quarter of a request's CPU.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    return app


def main() -> None:
    s = settings()
    log.info("starting", extra=vars(s))
    config = uvicorn.Config(
        "transaksi.__main__:create_app",
        factory=True,
        host=s.host,
        port=s.port,
        workers=s.workers,
        http=BoundedHttp,
        log_config=None,
        access_log=False,  # our own lines say more
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,  # for a client that never ends its request
    )
    sockets = [config.bind_socket()]
    if s.workers > 1:
        Multiprocess(config, sockets).run()
        end_process()
    uvicorn.Server(config).run(sockets)


if __name__ == "__main__":
    main()
