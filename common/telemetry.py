"""Telemetry: JSON log lines on stdout, and helpers for OpenTelemetry traces."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog
from opentelemetry import metrics, trace
from opentelemetry.trace.propagation.tracecontext import (
    TraceContextTextMapPropagator,
)
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from structlog.contextvars import merge_contextvars
from structlog.processors import JSONRenderer
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from common.config import Settings

log: FilteringBoundLogger = structlog.get_logger()
tracer = trace.get_tracer(__name__)
propagator = TraceContextTextMapPropagator()


class Stdout:
    """Writes log lines to stdout. A line that cannot be written is dropped, not raised."""

    def write(self, line: bytes) -> None:
        with suppress(OSError):
            sys.stdout.buffer.write(line)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.buffer.flush()


def add_trace(_: Any, __: str, event: EventDict) -> EventDict:
    """Add the ids of the current span."""
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"] = trace.format_trace_id(span.trace_id)
        event["span_id"] = trace.format_span_id(span.span_id)
    return event


def format_error(_: Any, __: str, event: EventDict) -> EventDict:
    """Turn an exception into text. A server's own text may quote data, so it stays out."""
    if exc_info := event.pop("exc_info", None):
        kind, error, trail = exc_info if isinstance(exc_info, tuple) else sys.exc_info()
        if isinstance(error, DBAPIError | RedisError):
            event["error"] = error_summary(error)
        elif kind:
            event["error"] = f"{''.join(traceback.format_tb(trail))}{kind.__name__}: {error}"
    return event


def start_logging(service: str, settings: Settings) -> None:
    """Log everything, libraries included, to stdout: one JSON object a line."""

    def order_fields(_: Any, method: str, event: EventDict) -> EventDict:
        """Put the fields that every line has first."""
        return {
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": method.upper(),
            "message": event.pop("event"),
            "service": service,
            **dict(sorted(event.items())),
        }

    processors: list[Processor] = [merge_contextvars, add_trace, format_error, order_fields]
    structlog.configure(
        processors=[*processors, JSONRenderer(orjson.dumps)],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.BytesLoggerFactory(Stdout()),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    # Loggers of libraries: https://www.structlog.org/en/stable/standard-library.html
    handler = logging.StreamHandler(sys.stdout)
    processors.insert(0, ProcessorFormatter.remove_processors_meta)
    render = JSONRenderer(separators=(",", ":"))
    handler.setFormatter(ProcessorFormatter(processors=[*processors, render]))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.raiseExceptions = False  # a line that cannot be written is dropped
    sys.excepthook = lambda *error: log.critical("died", exc_info=error)
    log.info("starting", **vars(settings))
    for name in ("DB_PASSWORD", "REDIS_PASSWORD"):
        if os.environ.get(name, "").endswith("-dev"):
            log.warning("development password in use", variable=name)


def error_summary(error: Exception) -> str:
    """Summarise a server error in one line, without its text about data.

    What remains is libpq's text about a connection, or redis-py's text without the
    command of a pipeline.
    """
    cause: Any = getattr(error, "orig", None) or error
    name = type(cause).__name__
    if code := getattr(cause, "pgcode", None):
        return f"{name} {code} {cause.diag.constraint_name or ''}".strip()
    text = str(cause).rpartition(" of pipeline caused error: ")[2]
    first_line = text.partition("\n")[0]
    return f"{name}: {first_line}"


def mask(no_rekening: str) -> str:
    """Return an account number as logs and traces show it: only the last four digits."""
    return "*" * (len(no_rekening) - 4) + no_rekening[-4:]


def current_traceparent() -> str | None:
    """Return the current span as a W3C traceparent, or None without a trace.

    https://www.w3.org/TR/trace-context/#traceparent-header
    """
    carrier: dict[str, str] = {}
    propagator.inject(carrier)
    return carrier.get("traceparent")


def add_gauge(name: str, unit: str, read: Callable[[], float]) -> None:
    """Report `read()` whenever metrics are exported, if OTEL_METRICS_EXPORTER is set."""
    observe = [lambda _: [metrics.Observation(read())]]
    metrics.get_meter(__name__).create_observable_gauge(name, observe, unit)
