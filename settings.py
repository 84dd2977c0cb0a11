"""What both services share: arguments and environment, JSON logging, the way to PostgreSQL and Redis."""

import argparse
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar

import sqlalchemy
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pythonjsonlogger.json import JsonFormatter
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy.exc import DBAPIError

log = logging.getLogger(__name__)

STREAM = "mutasi"
_PROPAGATOR = TraceContextTextMapPropagator()
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
        self.option("--log-level", log_level, "INFO", ", ".join(LEVELS))

    def option(self, name: str, kind: Callable[[str], object], default: object, meaning: str) -> None:
        self.add_argument(
            name, type=kind, default=default, metavar="X", help=f"{meaning} (default: {default})"
        )

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


def log_level(text: str) -> str:
    """An argparse type: the name of a log level, in any case."""
    if text.upper() not in LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(LEVELS)}")
    return text.upper()


# ---------------------------------------------------------------- logging


class JsonLines(logging.Handler):
    """One JSON object a line on stdout, written by a thread of its own.

    Callers never wait: past a bounded backlog (a reader of stdout that is too slow) lines are dropped, and one
    WARNING says how many.
    """

    BACKLOG = 10_000

    def __init__(self, service: str) -> None:
        super().__init__()
        self.setFormatter(JsonLine(service))
        self._records: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            record.trace_id = trace.format_trace_id(span.trace_id)
            record.span_id = trace.format_span_id(span.span_id)
        if self._records.qsize() < self.BACKLOG:
            self._records.put(record)
        else:
            self._dropped += 1

    def _write(self) -> None:
        # Whole lines, no more than a pipe takes at once: several processes may share it. Not through sys.stdout,
        # whose lock would abort the exit of a process that waits for the reader.
        lines = b""
        for record in iter(self._records.get, None):
            line = f"{self.format(record)}\n".encode()
            if len(lines + line) > select.PIPE_BUF:
                _to_stdout(lines)
                lines = b""
            lines += line
            if self._records.empty():
                _to_stdout(lines)
                lines = b""
                if self._dropped:
                    count, self._dropped = self._dropped, 0
                    log.warning("log lines dropped: stdout is too slow", extra={"jumlah": count})
                time.sleep(0.02)  # lets lines gather: to wake a thread for each costs more than the line
        _to_stdout(lines)

    def close(self) -> None:
        """Write what is left; give up after 2 s, since whoever reads stdout may have stopped reading."""
        self._records.put(None)
        self._thread.join(timeout=2)
        super().close()


def _to_stdout(lines: bytes) -> None:
    while lines:
        lines = lines[os.write(sys.stdout.fileno(), lines) :]


class JsonLine(JsonFormatter):
    """timestamp (RFC 3339, UTC), level, message, logger, service, then the record's own context."""

    def __init__(self, service: str) -> None:
        super().__init__(
            ["asctime", "levelname", "message", "name"],
            rename_fields={"asctime": "timestamp", "levelname": "level", "name": "logger"},
            static_fields={"service": service},
            reserved_attrs=[*logging.makeLogRecord({}).__dict__, "color_message", "taskName"],
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        moment = datetime.fromtimestamp(record.created, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def formatException(self, ei: Any) -> str:  # noqa: N802
        # The frames and the type, never the text: a database's prints the rows it is about.
        kind, _, trail = ei
        return "".join(traceback.format_tb(trail)) + str(kind.__name__)


def start_logging(service: str, level: str) -> None:
    """Send every logger's lines, the libraries' too, through `JsonLines`."""
    logging.basicConfig(level=level, handlers=[JsonLines(service)], force=True)
    logging.captureWarnings(capture=True)
    threading.excepthook = _die
    # No line shows these: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


def _die(args: threading.ExceptHookArgs) -> None:
    # Without one of its threads a process looks alive and does nothing: better none, and a restart.
    log.critical("%s died", args.thread and args.thread.name, exc_info=args[:3])  # type: ignore[arg-type]
    logging.shutdown()
    os._exit(1)


def masked(no_rekening: str) -> str:
    """An account number as logs and traces show it: the last four digits only."""
    return "*" * (len(no_rekening) - 4) + no_rekening[-4:]


def business(movement: Any) -> dict[str, Any]:
    """What logs and traces say of a movement."""
    names = ("id_transaksi", "jenis_transaksi", "nominal")
    return {"no_rekening": masked(movement.no_rekening)} | {n: getattr(movement, n) for n in names}


def give_up(message: str, **context: object) -> NoReturn:
    """One CRITICAL line and exit status 1."""
    log.critical(message, extra=context)
    sys.exit(1)


# ---------------------------------------------------------------- tracing (the API only: without an SDK it does nothing)


def traceparent() -> str | None:
    """The current span as a W3C traceparent (https://www.w3.org/TR/trace-context/), None outside of a trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


def trace_of(traceparent: str | None) -> Context:
    """The context in which a span becomes a child of `traceparent`; without one, or with a bad one, a root."""
    return _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {}, Context())


def batch_span(
    tracer: trace.Tracer, name: str, traceparents: Iterable[str | None]
) -> AbstractContextManager[object]:
    """A batch's own trace, linked to those of the movements in it; nothing where none of them is traced."""
    spans = [trace.get_current_span(trace_of(t)) for t in traceparents if t]
    if not spans:
        return nullcontext()
    links = [trace.Link(span.get_span_context()) for span in spans]
    count = {"messaging.batch.message_count": len(links)}
    return tracer.start_as_current_span(name, Context(), links=links, attributes=count)


def messaging(operation: str) -> dict[str, str]:
    """A span's messaging attributes (https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/)."""
    return {
        "messaging.system": "redis",
        "messaging.destination.name": STREAM,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }


# ---------------------------------------------------------------- PostgreSQL and Redis


def open_postgres(settings: Settings, pool_size: int, **session: str | int) -> sqlalchemy.Engine:
    """Make an engine; `session` are PostgreSQL's settings for its connections, such as time limits in ms.

    A server that hangs is given up by those and by the socket's time limits
    (https://www.postgresql.org/docs/18/libpq-connect.html).
    """
    session["timezone"] = "UTC"
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
        facts["detail"] = str(error)
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


class Outage:
    """Whether a server is away, said once when it goes and once when it is back."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._since: float | None = None

    def begin(self, error: BaseException | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            log.error("%s is away", self._server, extra=describe(error))

    def end(self) -> None:
        if self._since is not None:
            away, self._since = time.monotonic() - self._since, None
            log.info("%s is back", self._server, extra={"duration_ms": round(away * 1000)})


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
