"""The way to PostgreSQL and Redis: connections that give up in time, and what is said of their errors."""

import logging
import time
from collections.abc import Callable

import sqlalchemy
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy.exc import DBAPIError

from settings import Settings
from telemetry import give_up

log = logging.getLogger(__name__)

STREAM = "mutasi"
START_LIMIT_S = 30


def open_postgres(settings: Settings, pool_size: int, **session: str | int) -> sqlalchemy.Engine:
    """Make an engine; `session` are PostgreSQL's settings for its connections, such as time limits in ms.

    A machine that is gone is given up by the socket's time limits
    (https://www.postgresql.org/docs/18/libpq-connect.html); a server that is stopped is waited for, while requests
    are answered by their own.
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
