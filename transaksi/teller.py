"""The teller: many requests, one transaction (group commit).

Each request puts its command in a queue and awaits the answer. One writer thread takes all that wait and moves them
in one transaction: one wait for the disk and a handful of statements for the whole batch. Answers go out after the
commit, never before.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from opentelemetry import trace
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from servers import Outage, data_refused, describe, sqlstate
from telemetry import batch_span
from transaksi import datastore
from transaksi.app import Ditolak, Gerakan, Hasil, Perintah, Ulangan, Unavailable, Unknown, decide

log = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

BATCH = 512
TRIES = 5
PROBE = Perintah("tarik", no_rekening="", nominal=1)  # goes the whole way, and is refused at its end
DEADLOCK = ("40P01", "40001")  # and serialization failure: the batch may just be tried again


Answer = Hasil | Unavailable | Unknown


@dataclass(slots=True, eq=False)
class Ticket:
    """A command and who waits for its answer."""

    perintah: Perintah
    future: asyncio.Future[Gerakan | Ulangan]
    taken: bool = False


class Teller:
    """The queue of one process and the thread that works it off.

    `committed` is called after each commit that put something into the outbox.
    """

    def __init__(self, engine: Engine, max_queue: int, committed: Callable[[], None]) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._committed = committed
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._claim = threading.Lock()
        self._outage = Outage(log, "PostgreSQL")
        self._probe: asyncio.Future[bool] | None = None
        self._thread = threading.Thread(target=self._run, name="teller", daemon=True)

    def start(self) -> None:
        """Start the writer; to be called in the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Work off the queue, then end the writer; returns after 2 s even if the database hangs."""
        self._queue.put(None)
        self._thread.join(timeout=2)

    async def submit(self, perintah: Perintah) -> Gerakan | Ulangan:
        """Carry out a command. Raises `Ditolak` where the rules refuse it, `Unavailable` where it was not carried out
        (queue full, database away), `Unknown` where nobody can tell.

        The time limit is the caller's: when its task is cancelled, this raises `Unavailable` or `Unknown`, too.
        """
        if self._queue.qsize() >= self._max_queue:
            raise Unavailable
        ticket = Ticket(perintah, self._loop.create_future())
        self._queue.put(ticket)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            if not ticket.future.cancelled():  # the answer came at the same moment
                return ticket.future.result()
            with self._claim:
                raise (Unknown if ticket.taken else Unavailable) from None

    async def can_serve(self) -> bool:
        """Whether a command could be carried out now. One probe serves all who ask meanwhile: anybody may ask, and
        the queue is the customers'."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._try_probe())
        return await asyncio.shield(self._probe)

    async def _try_probe(self) -> bool:
        try:
            async with asyncio.timeout(2):
                await self.submit(PROBE)
        except Ditolak:
            return True
        except (Unavailable, Unknown):
            pass
        return False

    def _run(self) -> None:
        while True:
            batch, last = self._take()
            if batch:
                answers = self._settle([ticket.perintah for ticket in batch])
                with suppress(RuntimeError):  # the event loop has ended
                    self._loop.call_soon_threadsafe(_deliver, batch, answers)
            if last:
                return

    def _take(self) -> tuple[list[Ticket], bool]:
        """Wait for a command, then take all that wait; True with the last ones before the end."""
        waiting = [self._queue.get()]
        while waiting[-1] and len(waiting) < BATCH and not self._queue.empty():
            waiting.append(self._queue.get())
        with self._claim:
            batch = [t for t in waiting if t and not t.future.done()]
            for ticket in batch:
                ticket.taken = True
        return batch, waiting[-1] is None

    def _settle(self, perintah: list[Perintah]) -> Sequence[Answer]:
        """One answer per command, whatever the database does."""
        for _ in range(TRIES):
            try:
                hasil = self._post(perintah)
            except Unknown as unknown:
                self._outage.begin(unknown.__cause__)
                return [Unknown() for _ in perintah]
            except DBAPIError as error:
                if sqlstate(error) in DEADLOCK:
                    continue
                if not data_refused(error):
                    self._outage.begin(error)
                elif len(perintah) > 1:
                    return [self._settle([one])[0] for one in perintah]
                else:
                    log.error("the database refused a command", extra=describe(error))
                return [Unavailable() for _ in perintah]
            self._outage.end()
            return hasil
        return [Unavailable() for _ in perintah]

    def _post(self, perintah: list[Perintah]) -> list[Hasil]:
        """The batch's transaction. Raises `Unknown` where COMMIT failed, `DBAPIError` where nothing happened."""
        spans = batch_span(tracer, "commit transaksi", (p.traceparent for p in perintah))
        with self._engine.connect() as connection, spans:
            saldo = datastore.lock_saldo(connection, {p.no_rekening for p in perintah})
            kunci = [(p.no_rekening, p.idempotency_key) for p in perintah if p.idempotency_key]
            tercatat = datastore.find_keys(connection, kunci) if kunci else {}
            hasil = decide(perintah, saldo, tercatat)
            if gerakan := [h for h in hasil if isinstance(h, Gerakan)]:
                datastore.record(connection, gerakan, saldo)
                try:
                    connection.commit()
                except DBAPIError as error:
                    raise Unknown from error
                self._committed()
        return hasil


def _deliver(batch: list[Ticket], answers: Sequence[Answer]) -> None:
    for ticket, answer in zip(batch, answers, strict=True):
        if ticket.future.done():  # its client has gone, or its deadline has passed
            continue
        if isinstance(answer, Exception):
            ticket.future.set_exception(answer)
        else:
            ticket.future.set_result(answer)
