"""What is seen of both services: JSON log lines, and the OpenTelemetry spans of their own (through the API only)."""

import json
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any, NoReturn

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

log = logging.getLogger(__name__)

ENCODER = json.JSONEncoder(default=str)  # made once: json.dumps makes one for each line
NOT_CONTEXT = {*logging.makeLogRecord({}).__dict__, "color_message", "taskName"}
_PROPAGATOR = TraceContextTextMapPropagator()


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
            try:
                line = f"{self.format(record)}\n".encode()
            except Exception:  # a library's bad line must not end all lines
                self._dropped += 1
                continue
            if len(lines + line) > select.PIPE_BUF:
                _to_stdout(lines)
                lines = b""
            lines += line
            if self._records.empty():
                _to_stdout(lines)
                lines = b""
                if self._dropped:
                    count, self._dropped = self._dropped, 0
                    log.warning("log lines dropped", extra={"jumlah": count})
                time.sleep(0.02)  # lets lines gather: to wake a thread for each costs more than the line
        _to_stdout(lines)

    def flush(self) -> None:
        """Wait, 1 s at most, until what is there is written."""
        deadline = time.monotonic() + 1
        while not self._records.empty() and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        """Write what is left; give up after 2 s, since whoever reads stdout may have stopped reading."""
        self._records.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2)
        super().close()


def _to_stdout(lines: bytes) -> None:
    while lines:
        lines = lines[os.write(sys.stdout.fileno(), lines) :]


class JsonLine(logging.Formatter):
    """timestamp (RFC 3339, UTC), level, message, logger, service, then the record's own context."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "message": record.getMessage(),
            "logger": record.name,
            "service": self._service,
        }
        line |= {name: value for name, value in record.__dict__.items() if name not in NOT_CONTEXT}
        if record.exc_info:
            # The frames and the type, never the text: a database's prints the rows it is about.
            kind, _, trail = record.exc_info
            line["exception"] = "".join(traceback.format_tb(trail)) + (kind.__name__ if kind else "")
        return ENCODER.encode(line)


def start_logging(service: str, level: str) -> None:
    """Send every logger's lines, the libraries' too, through `JsonLines`."""
    logging.basicConfig(level=level, handlers=[JsonLines(service)], force=True)
    logging.captureWarnings(capture=True)
    threading.excepthook = _die
    sys.excepthook = lambda kind, error, trail: log.critical("died", exc_info=(kind, error, trail))
    # No line shows these: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


def _die(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is EOFError:  # in a worker: uvicorn's supervisor is stopping it, or has been killed itself
        os.kill(os.getpid(), signal.SIGTERM)
        return
    # Without one of its threads a process looks alive and does nothing: better none, and a restart.
    log.critical("%s died", args.thread and args.thread.name, exc_info=args[:3])  # type: ignore[arg-type]
    try:
        logging.shutdown()
    finally:
        os._exit(1)


def flush() -> None:
    """Send off lines and spans: one worker of several ends by a signal, without Python's own good-byes."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    getattr(trace.get_tracer_provider(), "force_flush", lambda _: None)(1000)


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


def traceparent() -> str | None:
    """The current span as a W3C traceparent (https://www.w3.org/TR/trace-context/), None outside of a trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


def trace_of(traceparent: str | None) -> Context:
    """The context in which a span becomes a child of `traceparent`; without one, or with a bad one, a root."""
    return _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {}, Context())


def batch_span(tracer: trace.Tracer, name: str, traceparents: Iterable[str | None]) -> AbstractContextManager[object]:
    """A batch's own trace, linked to those of the movements in it; nothing where none of them is traced."""
    of_all = list(traceparents)
    spans = [trace.get_current_span(trace_of(t)) for t in of_all if t]
    if not spans:
        return nullcontext()
    return tracer.start_as_current_span(
        name,
        Context(),
        links=[trace.Link(span.get_span_context()) for span in spans],
        attributes={"messaging.batch.message_count": len(of_all)},
        record_exception=False,  # its text may print rows
        set_status_on_exception=False,
    )


def messaging(operation: str, stream: str) -> dict[str, str]:
    """A span's messaging attributes (https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/)."""
    return {
        "messaging.system": "redis",
        "messaging.destination.name": stream,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
