"""Telemetry: JSON log lines on stdout, and the few helpers for OpenTelemetry traces."""

import logging
import os
import sys
import time
import traceback
from contextlib import AbstractContextManager
from functools import cache
from logging.handlers import QueueHandler, QueueListener
from queue import Queue
from typing import Any, NoReturn

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from common.connections import describe

log = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

FIELDS = ("asctime", "levelname", "message", "name")
NAMES = {"asctime": "timestamp", "levelname": "level", "name": "logger", "exc_info": "exception"}
_PROPAGATOR = TraceContextTextMapPropagator()


class JsonFormatter(OrjsonFormatter):
    """Writes times as RFC 3339 in UTC, and no error text of a server that prints data."""

    converter = staticmethod(time.gmtime)
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def formatException(self, exc_info: Any) -> str:
        kind, error, trail = exc_info
        if isinstance(error, DBAPIError | RedisError):
            return describe(error)
        return f"{''.join(traceback.format_tb(trail))}{kind.__name__}: {error}"


class Handler(QueueHandler):
    """Queues records for a writer thread. Callers never wait: a full queue drops the record.

    The next line has the number of those dropped before it, as `lines_dropped`.
    """

    queue: Queue[logging.LogRecord]
    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            record.trace_id = trace.format_trace_id(span.trace_id)
            record.span_id = trace.format_span_id(span.span_id)
        if self.dropped:
            record.lines_dropped, self.dropped = self.dropped, 0
        return record  # formatted by the writer

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1 + getattr(record, "lines_dropped", 0)

    def flush(self) -> None:
        """Wait until all lines are written, half a second at most: nobody may be reading stdout."""
        deadline = time.monotonic() + 0.5
        while self.queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)


@cache
def start_logging(service: str, level: str) -> None:
    """Send the lines of all loggers, also of libraries, to stdout as JSON. A second call does nothing."""
    queue: Queue[logging.LogRecord] = Queue(10_000)
    writer = logging.StreamHandler(sys.stdout)
    added, known = {"service": service}, [*RESERVED_ATTRS, "color_message"]
    formatter = JsonFormatter(FIELDS, rename_fields=NAMES, static_fields=added, reserved_attrs=known)
    writer.setFormatter(formatter)
    QueueListener(queue, writer).start()
    logging.basicConfig(level=level, handlers=[Handler(queue)], force=True)
    logging.captureWarnings(capture=True)
    # Not collected, as no line shows them: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    sys.excepthook = lambda *error: log.critical("died", exc_info=error)


def end_process() -> NoReturn:
    """Send off log lines and spans, then end at once.

    Python's own exit would wait for its threads: for a database that hangs, or an unread stdout.
    """
    getattr(trace.get_tracer_provider(), "force_flush", lambda _: None)(1000)
    logging.getLogger().handlers[0].flush()
    os._exit(0)


def masked(no_rekening: str) -> str:
    """An account number as logs and traces show it: the last four digits only."""
    return "*" * (len(no_rekening) - 4) + no_rekening[-4:]


def traceparent() -> str | None:
    """The current span as a W3C traceparent (https://www.w3.org/TR/trace-context/), None without a trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


def message_span(
    operation: str, stream: str, parent: str, facts: dict[str, Any], started_ns: int | None = None
) -> AbstractContextManager[trace.Span]:
    """The span that sends ("send") or processes ("process") a stream message, after the span `parent`.

    Attributes: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
    """
    facts = facts | {"messaging.system": "redis", "messaging.destination.name": stream}
    facts |= {"messaging.operation.name": operation, "messaging.operation.type": operation}
    kind = trace.SpanKind.PRODUCER if operation == "send" else trace.SpanKind.CONSUMER
    context = _PROPAGATOR.extract({"traceparent": parent}, Context())
    return tracer.start_as_current_span(f"{operation} {stream}", context, kind, facts, start_time=started_ns)
