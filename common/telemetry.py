"""Telemetry: JSON log lines on stdout, and the few helpers for OpenTelemetry traces."""

import logging
import os
import sys
import time
import traceback
from datetime import UTC, datetime
from functools import cache
from logging.handlers import QueueHandler, QueueListener
from queue import Queue
from select import PIPE_BUF
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

log = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

NAMES = {"asctime": "timestamp", "levelname": "level", "name": "logger", "exc_info": "exception"}
DATABASES = ("sqlalchemy", "psycopg2", "redis")  # the text of their errors prints data
_PROPAGATOR = TraceContextTextMapPropagator()


class JsonFormatter(OrjsonFormatter):
    """timestamp (RFC 3339, UTC), level, message, logger, service, then the record's own context."""

    def __init__(self, service: str) -> None:
        fields, known = ("asctime", "levelname", "message", "name"), (*RESERVED_ATTRS, "color_message")
        super().__init__(
            fields, rename_fields=NAMES, static_fields={"service": service}, reserved_attrs=known
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def formatException(self, exc_info: Any) -> str:
        """Traceback, type and text, without the text of a database's error."""
        kind, error, trail = exc_info
        text = "" if kind.__module__.startswith(DATABASES) else f": {error}"
        return f"{''.join(traceback.format_tb(trail))}{kind.__name__}{text}"


class Listener(QueueListener):
    """Writes queued records to stdout in its thread, as many whole lines a call as a pipe takes at once.

    A write of up to PIPE_BUF bytes is atomic (pipe(7)), so that processes may share a pipe.
    """

    queue: Queue[logging.LogRecord]

    def __init__(self, service: str) -> None:
        super().__init__(Queue(10_000))
        self.dropped = 0
        self.unwritten = b""
        self._formatter = JsonFormatter(service)

    def handle(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self._formatter.format(record)}\n".encode()
        except Exception:  # a library's bad call must not end the log
            line = b""
            self.dropped += 1
        if len(self.unwritten + line) > PIPE_BUF:
            self._write()
        self.unwritten += line
        if self.queue.empty():
            self._write()
            if self.dropped:
                count, self.dropped = self.dropped, 0
                log.warning("log lines dropped", extra={"count": count})
            time.sleep(0.02)  # lets lines gather: to wake a thread costs more than a line

    def _write(self) -> None:
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[os.write(1, self.unwritten) :]
        except OSError:  # the reader is gone
            self.unwritten = b""


class Handler(QueueHandler):
    """Queues records for the listener. Callers never wait: a full queue drops the record."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener.queue)
        self._listener = listener

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            record.trace_id = trace.format_trace_id(span.trace_id)
            record.span_id = trace.format_span_id(span.span_id)
        return record

    def handleError(self, _: logging.LogRecord) -> None:
        self._listener.dropped += 1

    def flush(self) -> None:
        """Wait until all lines are written, 1 s at most: nobody may be reading stdout."""
        deadline = time.monotonic() + 1
        while (
            self._listener.queue.unfinished_tasks or self._listener.unwritten
        ) and time.monotonic() < deadline:
            time.sleep(0.01)


@cache
def start_logging(service: str, level: str) -> None:
    """Send the lines of all loggers, also of libraries, to stdout as JSON. A second call does nothing."""
    listener = Listener(service)
    listener.start()
    logging.basicConfig(level=level, handlers=[Handler(listener)], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda *error: log.critical("died", exc_info=error)
    # Facts that no line shows: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


def flush() -> None:
    """Send off log lines and spans, in 2 s at most: `os._exit` would lose them."""
    getattr(trace.get_tracer_provider(), "force_flush", lambda _: None)(1000)
    for handler in logging.getLogger().handlers:
        handler.flush()


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
) -> trace.Span:
    """Start the span that sends ("send") or processes ("process") a stream message, a child of `parent`.

    Attributes: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
    """
    kinds = {"send": trace.SpanKind.PRODUCER, "process": trace.SpanKind.CONSUMER}
    messaging = {"system": "redis", "destination.name": stream}
    messaging |= {"operation.name": operation, "operation.type": operation}
    return tracer.start_span(
        f"{operation} {stream}",
        context=_PROPAGATOR.extract({"traceparent": parent}, Context()),
        kind=kinds[operation],
        attributes={f"messaging.{name}": value for name, value in messaging.items()} | facts,
        start_time=started_ns,
    )
