"""The relay: committed movements to the Redis Stream, at least once.

The teller hands over each batch in memory, right after its commit. What cannot be sent is dropped: a
movement stays in the outbox until the mutation book has it. Every now and then the relay looks there for
movements that were lost on the way, and sends them again.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Any

from redis import Redis
from sqlalchemy import Engine

from common.connections import Database
from common.telemetry import masked, message_span, traceparent
from transaksi import datastore
from transaksi.app import Movement

log = logging.getLogger(__name__)

STREAM = "mutasi"
BATCH = 1000
GATHER_S = 0.01  # larger batches cost fewer fsyncs, and fewer transactions in mutasi
PAUSE_S = 1  # after a failure
MAX_WAITING = 10_000


class Relay:
    """The relay of one process. `database` has one thread, which also talks to Redis.

    Nothing is sent while the stream has `max_stream` entries. A movement that is not booked after twice
    `resend_after_s` is sent again.
    """

    def __init__(self, database: Database, redis: Redis, max_stream: int, resend_after_s: int) -> None:
        self._database, self._redis = database, redis
        self._max_stream, self._resend_after_s = max_stream, resend_after_s
        self._waiting: deque[tuple[float, Movement]] = deque(maxlen=MAX_WAITING)  # with the time they came
        self.work: asyncio.Task[None] | None = None
        self._alarm = logging.INFO

    def hand_over(self, movements: list[Movement]) -> None:
        """Take committed movements. If there are too many, the oldest are dropped."""
        self._waiting.extend((time.monotonic(), movement) for movement in movements)
        if self._waiting and (not self.work or self.work.done()):
            self.work = asyncio.create_task(self._send_waiting())

    async def _send_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            # Older ones are dropped, as `_resend` may send them from the outbox at any moment.
            since = time.monotonic() - self._resend_after_s
            try:
                await self._database.run(self._send, [movement for came, movement in batch if came > since])
            except Exception:
                log.exception("sending to the stream failed")
                await asyncio.sleep(PAUSE_S)

    async def watch(self) -> None:
        """Look for lost movements every half of `resend_after_s`, until cancelled."""
        while True:
            try:
                while await self._database.run(self._resend) == BATCH:
                    pass
            except Exception:
                log.exception("looking for lost movements failed")
            await asyncio.sleep(self._resend_after_s / 2)

    def _send(self, _: Engine, movements: list[Movement]) -> None:
        """Add movements to the stream, all or none, with one fsync. A full stream takes none."""
        if self._redis.xlen(STREAM) < self._max_stream:
            with self._redis.pipeline(transaction=True) as pipe:
                for movement in movements:
                    pipe.xadd(STREAM, message(movement))
                pipe.execute()

    def _resend(self, engine: Engine) -> int:
        """Send up to `BATCH` lost movements again. Returns how many.

        While the stream is empty or its oldest entry is young, nothing is just late: a row that was sent long
        ago and is not booked was lost. It is marked, committed and then sent: no row is locked while Redis is
        waited for, and if sending fails, it is tried again later.
        """
        age_s = datastore.outbox_age(engine)
        turns = age_s / self._resend_after_s
        alarm = logging.ERROR if turns > 10 else logging.WARNING if turns > 3 else logging.INFO
        if alarm != self._alarm:  # once at each change
            text = "outbox is behind" if turns > 3 else "outbox has caught up"
            log.log(alarm, text, extra={"age_s": round(age_s)})
            self._alarm = alarm
        now_s, _ = self._redis.time()  # ids of entries begin with their time, by Redis' clock
        late = self._redis.xrange(STREAM, max=(now_s - self._resend_after_s) * 1000, count=1)
        if late or self._redis.xlen(STREAM) >= self._max_stream:
            return 0
        if lost := datastore.mark_lost(engine, 2 * self._resend_after_s, BATCH):
            self._send(engine, lost)
            log.info("movements sent from the outbox", extra={"count": len(lost)})
        return len(lost)


def message(movement: Movement) -> dict[Any, Any]:
    """The stream entry of a movement, with a span that continues its request's trace."""
    entry = {
        "id_transaksi": movement.id,
        "no_rekening": movement.no_rekening,
        "jenis_transaksi": movement.jenis_transaksi,
        "nominal": movement.nominal,
        "tanggal_transaksi": str(movement.tanggal_transaksi).replace(" ", "T"),
    }
    if movement.traceparent:
        facts = entry | {"no_rekening": masked(movement.no_rekening)}
        with message_span("send", STREAM, movement.traceparent, facts):
            entry["traceparent"] = traceparent() or movement.traceparent
    return entry
