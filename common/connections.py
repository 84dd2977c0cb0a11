"""Connections to PostgreSQL and Redis: their time limits, and what is logged of their errors."""

import logging
import time
from argparse import Namespace
from typing import Any

import sqlalchemy
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.exc import DBAPIError


def open_postgres(
    settings: Namespace, pool_size: int = 1, ping: bool = False, **session: Any
) -> sqlalchemy.Engine:
    """Make an engine. `session` are PostgreSQL's settings for its connections, time limits in ms.

    `ping` tests a pooled connection before each use. The TCP time limits detect a dead host:
    https://www.postgresql.org/docs/18/libpq-connect.html
    """
    # A plan, such as a foreign key's, lives as long as its session. One made while a table was small would
    # read the whole table later: so no sequential scans.
    session |= {"timezone": "UTC", "enable_seqscan": "off"}
    address = {"host": settings.db_host, "port": settings.db_port, "dbname": settings.db_name}
    secrets = {"user": settings.db_user, "password": settings.db_password}
    limits = {"connect_timeout": 3, "tcp_user_timeout": 5000}
    limits |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
    options = {"options": " ".join(f"-c {name}={value}" for name, value in session.items())}
    return sqlalchemy.create_engine(
        "postgresql+psycopg2://",
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=ping,
        hide_parameters=True,
        connect_args=address | secrets | limits | options,
    )


def open_redis(settings: Namespace) -> Redis:
    """Make a client that gives up after 2 s and does not retry."""
    retry = Retry(NoBackoff(), 0)
    limits: dict[str, Any] = {"socket_timeout": 2, "socket_connect_timeout": 2, "retry": retry}
    return Redis(settings.redis_host, settings.redis_port, password=settings.redis_password, **limits)


def sqlstate(error: BaseException) -> str:
    """The SQLSTATE of an error, "" if the server sent none (a broken connection)."""
    return getattr(getattr(error, "orig", None), "pgcode", None) or ""


def data_refused(error: DBAPIError) -> bool:
    """Whether the database refused the data (SQLSTATE class 22 or 23): a retry cannot help."""
    return sqlstate(error)[:2] in ("22", "23")


def describe(error: BaseException) -> dict[str, object]:
    """What a log line shows of an error. PostgreSQL's own text prints rows and stays out."""
    cause: Any = getattr(error, "orig", None) or error
    facts: dict[str, object] = {"error": type(cause).__name__}
    if code := sqlstate(error):
        return facts | {"sqlstate": code, "constraint": cause.diag.constraint_name}
    # libpq's text about a connection, or redis-py's without a pipeline's command, which prints data
    return facts | {"detail": str(cause).rpartition(" of pipeline caused error: ")[2].partition("\n")[0]}


class Outage:
    """Logs once when a server fails, and once when it works again."""

    def __init__(self, log: logging.Logger, server: str) -> None:
        self._log, self._server = log, server
        self._since = 0.0

    def begin(self, error: BaseException) -> None:
        if not self._since:
            self._since = time.monotonic()
            self._log.error("%s failed", self._server, extra=describe(error))

    def end(self) -> None:
        if self._since:
            away_ms = round((time.monotonic() - self._since) * 1000)
            self._since = 0.0
            self._log.info("%s works again", self._server, extra={"duration_ms": away_ms})
