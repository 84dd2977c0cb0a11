"""The relay: the outbox's committed movements to the Redis Stream, at least once.

In one transaction it takes rows out of the outbox, adds them to the stream, and commits. A failure puts the rows back;
a crash in between sends them twice, which the consumer knows to ignore. Whatever Redis may lose afterwards is found by
`_reconcile`, which compares the journal with the mutation book.
"""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from opentelemetry import trace
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import Engine, Row
from sqlalchemy.exc import DBAPIError

from servers import STREAM, Outage
from telemetry import business, messaging, trace_of, traceparent
from transaksi import datastore

log = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

BATCH = 1000
POLL_S = 0.5  # for rows that another process left behind
GATHER_S = 0.01  # many rows a turn: fewer transactions and fewer fsyncs, here and in mutasi


class Relay:
    """The background thread that hands movements over.

    While the stream is longer than `max_stream` entries the rest waits in PostgreSQL. Movements older than
    `reconcile_after` seconds without a mutation row are sent again.
    """

    def __init__(self, engine: Engine, redis: Redis, max_stream: int, reconcile_after: int) -> None:
        self._engine = engine
        self._redis = redis
        self._max_stream = max_stream
        self._reconcile_after = reconcile_after
        self._checked = 0  # every movement up to this id has its mutation, but for the missing
        self._missing: Sequence[int] = ()
        self._next_reconcile = 0.0
        self._full = False
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._outage = Outage(log, "the way to the stream")
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something is in the outbox."""
        self._woken.set()

    def stop(self) -> None:
        """Hand over what is there, then end; what cannot be handed over within 1 s stays in the outbox."""
        self._stopping.set()
        self.wake()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        pause = 0.0
        while True:
            stopping = self._stopping.is_set()  # read before the last turn, not after it
            try:
                handed_over = self._hand_over() if self._room() else 0
                self._reconcile()
                self._outage.end()
                pause = 0.0
            except (DBAPIError, RedisError) as error:
                self._outage.begin(error)
                handed_over, pause = 0, min(pause + POLL_S, 5.0)
                self._stopping.wait(pause)
            if stopping and not handed_over:
                return
            if handed_over < BATCH and not stopping:
                self._woken.wait(POLL_S)
                self._woken.clear()
                time.sleep(GATHER_S)

    def _room(self) -> bool:
        """Whether the stream may grow: a backlog is kept on PostgreSQL's disk, not in Redis's memory."""
        full = self._redis.xlen(STREAM) >= self._max_stream
        if full and not self._full:
            log.warning("backlog growing: the stream is at its limit", extra={"batas": self._max_stream})
        self._full = full
        return not full

    def _hand_over(self) -> int:
        """Move up to `BATCH` movements from the outbox to the stream; how many."""
        with self._engine.begin() as connection, ExitStack() as spans:
            rows = datastore.take_outbox(connection, BATCH)
            if rows:
                with self._redis.pipeline(transaction=True) as pipe:  # all or nothing, one fsync
                    for row in rows:
                        pipe.xadd(STREAM, _message(row, spans))
                    pipe.execute()
                log.debug("batch handed to the stream", extra={"jumlah": len(rows)})
        return len(rows)

    def _reconcile(self) -> None:
        """Now and then, and only while nothing is merely late, send again what never arrived."""
        if time.monotonic() < self._next_reconcile:
            return
        self._next_reconcile = time.monotonic() + self._reconcile_after / 6
        late = self._reconcile_after / 2
        with self._engine.begin() as connection:
            if self._stream_age() > late or datastore.outbox_age(connection) > late:
                return
            found = datastore.reconcile(connection, self._checked, self._missing, self._reconcile_after)
        if found is None:  # another relay is at it
            return
        self._checked, self._missing = found.checked, found.missing
        if found.beda:
            log.critical(
                "audit difference: the mutation book says something else than the journal",
                extra={"id_transaksi": found.beda},
            )
        if found.missing:
            log.warning("movements without mutation sent again", extra={"jumlah": len(found.missing)})
            self.wake()
        if found.full:
            self._next_reconcile = 0.0

    def _stream_age(self) -> float:
        """Age in seconds, by Redis' own clock, of the oldest entry; 0 for an empty stream."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.xrange(STREAM, count=1)
            pipe.time()
            oldest, (now, _) = pipe.execute()
        return now - int(oldest[0][0].split(b"-")[0]) / 1000 if oldest else 0.0


def _message(row: Row[Any], spans: ExitStack) -> dict[Any, Any]:
    """The stream entry of a movement. Its span, a child of the request's, ends with `spans`."""
    message = {
        "id_transaksi": row.id_transaksi,
        "tanggal_transaksi": row.tanggal_transaksi.isoformat(),
        "no_rekening": row.no_rekening,
        "jenis_transaksi": row.jenis_transaksi,
        "nominal": row.nominal,
    }
    if row.traceparent:
        span = tracer.start_span(
            "send mutasi",
            context=trace_of(row.traceparent),
            kind=trace.SpanKind.PRODUCER,
            attributes=messaging("send", STREAM) | business(row),
        )
        spans.callback(span.end)
        with trace.use_span(span):
            message["traceparent"] = traceparent() or row.traceparent
    return message
