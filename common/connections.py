"""Connections to PostgreSQL and Redis: their time limits, and what is logged of their errors."""

import asyncio
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from redis import Redis
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.exc import DBAPIError

T = TypeVar("T")


def open_engine(settings: Namespace, limit_s: int = 10, ping: bool = False) -> Engine:
    """Make an engine. A statement ends after `limit_s`, a wait for a lock after half of it.

    `ping` tests a pooled connection before each use. The TCP time limits detect a dead host:
    https://www.postgresql.org/docs/18/libpq-connect.html
    """
    login = os.environ["DB_USER"], os.environ["DB_PASSWORD"]
    url = URL.create("postgresql+psycopg2", *login, settings.db_host, settings.db_port, settings.db_name)
    # A plan, such as a foreign key's, lives as long as its session. One made while a table was small would
    # read the whole table later: so no sequential scans.
    options = f"-c timezone=UTC -c enable_seqscan=off -c statement_timeout={limit_s}s"
    options += f" -c lock_timeout={500 * limit_s}ms -c idle_in_transaction_session_timeout={2 * limit_s}s"
    connect = {"options": options, "connect_timeout": 3, "tcp_user_timeout": 5000}
    connect |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
    # pool_size 0 sets no limit: the threads that use the engine are the limit.
    return create_engine(url, hide_parameters=True, connect_args=connect, pool_size=0, pool_pre_ping=ping)


class Database:
    """An engine with its own threads, one connection each. Teller, relay, PIN checks and reads have one each.

    `nice` gives the threads a low priority, on Linux, where niceness is a thread's own.
    """

    def __init__(self, settings: Namespace, threads: int, nice: int = 0, ping: bool = True) -> None:
        self._engine = open_engine(settings, settings.request_timeout, ping)
        lower = (lambda: os.nice(nice)) if sys.platform == "linux" else None
        self._executor = ThreadPoolExecutor(threads, initializer=lower)

    def run(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Start `function(engine, *arguments)` in a thread."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._executor, function, self._engine, *arguments)


def open_redis(settings: Namespace) -> Redis:
    """Make a client that gives up after 2 s and does not retry."""
    limits: Any = {"socket_timeout": 2, "socket_connect_timeout": 2, "retry": None}
    password = os.environ.get("REDIS_PASSWORD")
    return Redis(settings.redis_host, settings.redis_port, password=password, **limits)


def data_refused(error: DBAPIError) -> bool:
    """Whether the database refused the data (SQLSTATE class 22 or 23): a retry cannot help."""
    return (getattr(error.orig, "pgcode", None) or "")[:2] in ("22", "23")


def describe(error: Exception) -> str:
    """A line about an error of a server. PostgreSQL's own text may quote a row, so it stays out."""
    cause: Any = getattr(error, "orig", None) or error
    kind = type(cause).__name__
    if code := getattr(cause, "pgcode", None):
        return f"{kind} {code} {cause.diag.constraint_name or ''}".strip()
    # libpq's text about a connection, or redis-py's without a pipeline's command, which prints data
    return f"{kind}: {str(cause).rpartition(' of pipeline caused error: ')[2].partition(chr(10))[0]}"
