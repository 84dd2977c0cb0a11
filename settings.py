"""What both services are told (arguments, and secrets from the environment), and their way to PostgreSQL and Redis."""

import argparse
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import sqlalchemy
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy.exc import DBAPIError

from telemetry import give_up, start_logging

log = logging.getLogger(__name__)

STREAM = "mutasi"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
START_LIMIT_S = 30


class Settings(argparse.Namespace):
    """What both services are told: arguments, and from the environment the secrets."""

    db_host: str
    db_port: int
    db_name: str
    redis_host: str
    redis_port: int
    log_level: str
    db_user: str
    db_password: str
    redis_password: str | None

    def shown(self) -> dict[str, object]:
        """The settings without the secrets."""
        return {name: value for name, value in vars(self).items() if not name.endswith("password")}


S = TypeVar("S", bound=Settings)


class Parser(argparse.ArgumentParser):
    """The arguments both services have; a service adds its own with `option`."""

    def __init__(self, service: str, description: str) -> None:
        super().__init__(prog=f"python -m {service}", description=description, allow_abbrev=False)
        self._service = service
        self.option("--db-host", str, "127.0.0.1", "PostgreSQL host")
        self.option("--db-port", whole(1, 65535), 5432, "PostgreSQL port")
        self.option("--db-name", str, "tabungan", "PostgreSQL database")
        self.option("--redis-host", str, "127.0.0.1", "Redis host")
        self.option("--redis-port", whole(1, 65535), 6379, "Redis port")
        self.option("--log-level", str.upper, "INFO", ", ".join(LEVELS), choices=LEVELS)

    def option(
        self,
        name: str,
        kind: Callable[[str], object],
        default: object,
        meaning: str,
        choices: Sequence[str] | None = None,
    ) -> None:
        text = f"{meaning} (default: {default})"
        self.add_argument(name, type=kind, default=default, choices=choices, metavar="X", help=text)

    def settings(self, into: S) -> S:
        """Read arguments and environment and start logging; exits where one is missing or refused."""
        self.parse_args(namespace=into)
        start_logging(self._service, into.log_level)
        for name in ("DB_USER", "DB_PASSWORD"):
            if not os.environ.get(name):
                give_up(f"cannot start: the environment variable {name} is missing")
        into.db_user = os.environ["DB_USER"]
        into.db_password = os.environ["DB_PASSWORD"]
        into.redis_password = os.environ.get("REDIS_PASSWORD") or None
        return into


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def spare_gc() -> None:
    """Keep the garbage collector from reading all modules and what is in flight again and again.

    Measured: a quarter of the CPU of a request. https://docs.python.org/3/library/gc.html#gc.freeze
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


# ---------------------------------------------------------------- PostgreSQL and Redis


def open_postgres(settings: Settings, pool_size: int, **session: str | int) -> sqlalchemy.Engine:
    """Make an engine; `session` are PostgreSQL's settings for its connections, such as time limits in ms.

    A server that hangs is given up by those and by the socket's time limits
    (https://www.postgresql.org/docs/18/libpq-connect.html).
    """
    session["timezone"] = "UTC"
    # Every statement looks up keys. A plan made for a small table, such as that of a foreign key, lives on in the
    # session while the table grows: it must not be one that reads the whole table.
    session["enable_seqscan"] = "off"
    return sqlalchemy.create_engine(
        sqlalchemy.URL.create(
            "postgresql+psycopg2",
            settings.db_user,
            settings.db_password,
            settings.db_host,
            settings.db_port,
            settings.db_name,
        ),
        pool_size=pool_size,
        max_overflow=0,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
        connect_args={
            "connect_timeout": 3,
            "tcp_user_timeout": 5000,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "options": " ".join(f"-c {name}={value}" for name, value in session.items()),
        },
    )


def open_redis(settings: Settings) -> Redis:
    """Make a client that gives up after 2 s without retries: its callers hold a transaction meanwhile."""
    return Redis(
        host=settings.redis_host,
        port=settings.redis_port,
        password=settings.redis_password,
        socket_timeout=2,
        socket_connect_timeout=2,
        retry=Retry(NoBackoff(), 0),
    )


def describe(error: BaseException | None) -> dict[str, object]:
    """What a log line may say of an error: of PostgreSQL's own text nothing, since its DETAIL prints rows."""
    facts: dict[str, object] = {"error": type(error).__name__}
    if isinstance(error, RedisError):
        # without the command of a pipeline, which prints the movement
        facts["detail"] = str(error).rpartition(" of pipeline caused error: ")[2]
    if isinstance(error, DBAPIError) and error.orig is not None:
        facts["error"] = type(error.orig).__name__
        if sqlstate(error):
            facts["sqlstate"] = sqlstate(error)
            facts["constraint"] = error.orig.diag.constraint_name  # type: ignore[attr-defined]
        else:  # no server has seen a statement: libpq's text about the connection
            facts["detail"] = str(error.orig).partition("\n")[0]
    return facts


def sqlstate(error: BaseException | None) -> str:
    """The SQLSTATE of a database error, "" where the server gave none (a broken connection)."""
    code: str | None = getattr(getattr(error, "orig", None), "pgcode", None)
    return code or ""


def data_refused(error: BaseException | None) -> bool:
    """Whether the database refused a statement for its data (SQLSTATE class 22 or 23): to try again is no use."""
    return sqlstate(error)[:2] in ("22", "23")


class Outage:
    """Whether a server is away, said once when it goes and once when it is back."""

    def __init__(self, log: logging.Logger, server: str) -> None:
        self._log = log
        self._server = server
        self._since: float | None = None

    def begin(self, error: BaseException | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self._log.error("%s is away", self._server, extra=describe(error))

    def end(self) -> None:
        if self._since is not None:
            away, self._since = time.monotonic() - self._since, None
            self._log.info("%s is back", self._server, extra={"duration_ms": round(away * 1000)})


def wait_for(server: str, try_once: Callable[[], object]) -> None:
    """Return when `try_once` raises no more: a server may merely be late. Gives up after 30 s."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # also as a container's process 1
    deadline = time.monotonic() + START_LIMIT_S
    warned = False
    while True:
        try:
            try_once()
            return
        except (DBAPIError, RedisError) as error:
            if time.monotonic() > deadline:
                give_up(f"cannot start: {server} does not answer", **describe(error))
            if not warned:
                log.warning("waiting for %s", server, extra=describe(error))
                warned = True
        time.sleep(0.5)
