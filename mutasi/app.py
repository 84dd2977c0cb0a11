"""What is done with a batch: store each movement once, set bad messages aside."""

import logging
import time
from collections.abc import Sequence

from opentelemetry import trace
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from mutasi import datastore
from mutasi.datastore import Entry, Pesan, Stream
from settings import STREAM, describe, sqlstate
from telemetry import batch_span, business, messaging, trace_of

log = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

DATA_REFUSED = ("22", "23")  # SQLSTATE classes: data exception, integrity constraint violation


def store(engine: Engine, stream: Stream, pesan: Sequence[Pesan]) -> None:
    """Store a batch, then take it out of the stream.

    After a crash in between, the same messages come again and are known by their primary key. Those that the
    database refuses for their data are found by halving and set aside; any other error is raised, and nothing is
    lost by it.
    """
    started = time.time_ns()
    try:
        with batch_span(tracer, "insert mutasi", (p.traceparent for p in pesan)):
            new = datastore.insert_mutasi(engine, pesan)
    except DBAPIError as error:
        if sqlstate(error)[:2] not in DATA_REFUSED:
            raise
        if len(pesan) == 1:
            facts = describe(error)
            reason = f"refused by the database: {facts['error']} {facts['constraint'] or ''}".strip()
            set_aside(stream, pesan[0].entry, reason)
        else:
            middle = len(pesan) // 2
            store(engine, stream, pesan[:middle])
            store(engine, stream, pesan[middle:])
        return
    stream.delete([p.entry for p in pesan])
    for p in pesan:
        if p.id_transaksi in new:
            _report(p, started)
    log.debug("batch stored", extra={"jumlah": len(new), "duration_ms": (time.time_ns() - started) // 1_000_000})
    if len(new) < len(pesan):
        log.warning("messages came again", extra={"jumlah": len(pesan) - len(new)})


def set_aside(stream: Stream, entry: Entry, reason: str) -> None:
    """Move a bad message to the dead letters."""
    stream.set_aside(entry, reason)
    log.error("message set aside as dead letter", extra={"entry": entry.id.decode(), "reason": reason})


def _report(p: Pesan, started: int) -> None:
    """A stored movement's log line, and the end of its request's trace if it has one."""
    if not p.traceparent:
        log.info("mutation stored", extra=business(p))
        return
    span = tracer.start_span(
        "process mutasi",
        context=trace_of(p.traceparent),
        kind=trace.SpanKind.CONSUMER,
        attributes=messaging("process", STREAM) | business(p),
        start_time=started,
    )
    with trace.use_span(span, end_on_exit=True):
        log.info("mutation stored", extra=business(p))
