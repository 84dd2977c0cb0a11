"""What is done with a batch: store each movement once, set bad messages aside."""

import logging
import time
from collections.abc import Sequence

from opentelemetry import trace
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from mutasi import datastore
from mutasi.datastore import Entry, Pesan, Stream
from servers import STREAM, data_refused, describe
from telemetry import batch_span, business, messaging, trace_of

log = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)


def store(engine: Engine, stream: Stream, pesan: Sequence[Pesan]) -> None:
    """Store a batch, then take it out of the stream.

    After a crash in between, the same messages come again and are known by their primary key. Those that the
    database refuses for their data are found by halving and set aside; any other error is raised, and nothing is
    lost by it.
    """
    started = time.time_ns()
    try:
        with batch_span(tracer, "insert mutasi", (p.traceparent for p in pesan)):
            fresh = datastore.insert_mutasi(engine, pesan)
        new = len(fresh)
    except DBAPIError as error:
        if not data_refused(error):
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
    for p in pesan:
        if p.id_transaksi in fresh:
            fresh.discard(p.id_transaksi)
            _report(p, started)
    stream.delete([p.entry for p in pesan])
    log.debug("batch stored", extra={"jumlah": new, "duration_ms": (time.time_ns() - started) // 1_000_000})
    if new < len(pesan):
        log.warning("messages came again", extra={"jumlah": len(pesan) - new})


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
