"""The relay: committed movements to the Redis Stream, at least once.

The teller hands over each batch in memory, right after its commit. What cannot be sent is dropped: a
movement stays in the outbox until the mutation book has it. Every now and then the relay looks there for
movements that were lost on the way, and sends them again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

from redis import Redis
from sqlalchemy import Engine

from common.connections import Database
from common.telemetry import masked, message_span
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
        self._waiting: deque[tuple[float, Movement]] = deque()  # with the time of the handing over
        self._work: asyncio.Task[None] | None = None
        self._alarm = logging.INFO

    def hand_over(self, movements: Sequence[Movement]) -> None:
        """Take committed movements; those for which there is no room stay in the outbox."""
        now = asyncio.get_running_loop().time()
        self._waiting.extend((now, m) for m in movements[: MAX_WAITING - len(self._waiting)])
        if self._waiting and (not self._work or self._work.done()):
            self._work = asyncio.create_task(self._send_waiting())

    async def close(self) -> None:
        """Wait until all is sent, 1 s at most."""
        if self._work:
            await asyncio.wait([self._work], timeout=1)

    async def _send_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            # Older ones may have been sent again by `_resend` meanwhile.
            since = asyncio.get_running_loop().time() - self._resend_after_s
            young = [movement for handed_over, movement in batch if handed_over > since]
            if not await self._database.run(self._send, young):
                await asyncio.sleep(PAUSE_S)

    async def watch(self) -> None:
        """Look for lost movements every half of `resend_after_s`, until cancelled."""
        while True:
            while await self._database.run(self._resend) == BATCH:
                pass
            await asyncio.sleep(self._resend_after_s / 2)

    def _send(self, _: Engine, movements: Sequence[Movement]) -> bool:
        """Add movements to the stream, all or none, with one fsync. Returns false after a failure."""
        try:
            if self._redis.xlen(STREAM) >= self._max_stream:
                return False
            with self._redis.pipeline(transaction=True) as pipe:
                for movement in movements:
                    pipe.xadd(STREAM, message(movement))
                pipe.execute()
        except Exception:
            log.exception("sending to the stream failed")
            return False
        log.debug("batch sent to the stream", extra={"count": len(movements)})
        return True

    def _resend(self, engine: Engine) -> int:
        """Send up to `BATCH` lost movements again. Returns how many.

        While the stream is empty or its oldest entry is young, nothing is just late: a row that was sent long
        ago and is not booked was lost. It is marked, committed and then sent: no row is locked while Redis is
        waited for, and if sending fails, it is tried again later.
        """
        try:
            self._watch_age(datastore.outbox_age(engine))
            now_s, _ = self._redis.time()  # ids of entries begin with their time, by Redis' clock
            late = self._redis.xrange(STREAM, max=(now_s - self._resend_after_s) * 1000, count=1)
            if late or self._redis.xlen(STREAM) >= self._max_stream:
                return 0
            lost = datastore.mark_lost(engine, 2 * self._resend_after_s, BATCH)
        except Exception:
            log.exception("looking for lost movements failed")
            return 0
        if not lost or not self._send(engine, lost):
            return 0
        log.info("movements sent from the outbox", extra={"count": len(lost)})
        return len(lost)

    def _watch_age(self, age_s: float) -> None:
        """Log when the outbox falls behind, far behind, and when it has caught up: once each."""
        alarm, text = logging.INFO, "outbox has caught up"
        if age_s > 10 * self._resend_after_s:
            alarm, text = logging.ERROR, "outbox is far behind"
        elif age_s > 3 * self._resend_after_s:
            alarm, text = logging.WARNING, "outbox is behind"
        if alarm != self._alarm:
            log.log(alarm, text, extra={"age_s": round(age_s)})
            self._alarm = alarm


def message(movement: Movement) -> dict[Any, Any]:
    """The stream entry of a movement, with a span that continues its request's trace."""
    command = movement.command
    entry = {
        "id_transaksi": movement.id_transaksi,
        "no_rekening": command.no_rekening,
        "jenis_transaksi": command.jenis_transaksi,
        "nominal": command.nominal,
        "tanggal_transaksi": str(movement.tanggal_transaksi).replace(" ", "T"),
    }
    if command.traceparent:
        facts = entry | {"no_rekening": masked(command.no_rekening)}
        with message_span("send", STREAM, command.traceparent, facts) as traceparent:
            entry["traceparent"] = traceparent
    return entry
