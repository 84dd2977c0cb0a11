"""Sends each committed movement to the Redis Stream, at least once.

The teller hands over each batch in memory, right after its commit. What cannot be sent is
dropped: a movement stays in the outbox until it is booked, and lost ones are resent from there.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from redis import Redis
from sqlalchemy import Engine, RowMapping

from common.stream import STREAM, span, to_entry
from common.telemetry import current_traceparent, log
from transaksi import datastore
from transaksi.datastore import Database


class Stream:
    """The way of committed movements to service mutasi.

    A movement that is not booked after twice `resend_after_s` seconds is resent.
    """

    BATCH = 1000
    MAX_WAITING = 10_000
    GATHER_S = 0.015  # larger batches cost fewer fsyncs, and fewer transactions in mutasi
    PAUSE_S = 1  # after an error

    def __init__(self, database: Database, redis: Redis, resend_after_s: int) -> None:
        self._database = database
        self._redis = redis
        self._resend_after_s = resend_after_s
        self._waiting: deque[RowMapping] = deque(maxlen=self.MAX_WAITING)
        self._arrived = asyncio.Event()

    def hand_over(self, journal: Sequence[RowMapping]) -> None:
        """Take the journal rows of committed movements. Drops the oldest above MAX_WAITING."""
        self._waiting.extend(journal)
        self._arrived.set()

    async def run(self) -> None:
        """Send what is handed over until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await asyncio.sleep(self.GATHER_S)
            try:
                await self._send_waiting()
            except Exception:
                self._waiting.clear()  # resent later; more would fail, too
                await self._failed("sending to the stream failed")

    async def close(self) -> None:
        """Send what waits, within two seconds."""
        try:
            async with asyncio.timeout(2):
                await self._send_waiting()
        except Exception:
            log.exception("sending to the stream failed")

    async def _send_waiting(self) -> None:
        while self._waiting:
            count = min(len(self._waiting), self.BATCH)
            batch = [self._waiting.popleft() for _ in range(count)]
            await self._database.run(self._send, batch)

    async def resend(self) -> None:
        """Look for lost movements, and resend them, until cancelled."""
        while True:
            try:
                while await self._database.run(self._resend_lost) == self.BATCH:
                    pass
            except Exception:
                await self._failed("resending failed")
            await asyncio.sleep(self._resend_after_s / 2)

    async def _failed(self, message: str) -> None:
        """Log the current exception, have the Redis client connect anew, and pause."""
        log.exception(message)
        self._redis.connection_pool.disconnect(inuse_connections=False)  # a gauge may use one
        await asyncio.sleep(self.PAUSE_S)

    def _send(self, _: Engine, journal: Sequence[RowMapping]) -> None:
        """Add movements to the stream in one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for row in journal:
                pipe.xadd(STREAM, traced_entry(row))
            pipe.execute()

    def _resend_lost(self, engine: Engine) -> int:
        """Resend movements that were lost. Returns how many.

        1. Service mutasi reads the oldest entries first. If the oldest one is older than
           `resend_after_s`, mutasi is behind, and nothing is resent.
        2. Otherwise everything sent twice as long ago was read or lost. If it is not booked,
           it was lost.
        3. It is marked as sent before it is sent, so that no row lock is held while waiting
           for Redis.
        """
        self._report_age(datastore.outbox_age(engine))
        now_s, _ = self._redis.time()  # ids of entries begin with their time in milliseconds
        limit_ms = (now_s - self._resend_after_s) * 1000
        if self._redis.xrange(STREAM, max=limit_ms, count=1):
            return 0
        lost = datastore.claim_lost(engine, 2 * self._resend_after_s, self.BATCH)
        if lost:
            self._send(engine, lost)
            log.info("movements resent", count=len(lost))
        return len(lost)

    def _report_age(self, age_s: float) -> None:
        if age_s > 3 * self._resend_after_s:
            report = log.error if age_s > 10 * self._resend_after_s else log.warning
            report("outbox is behind", age_s=round(age_s))


def traced_entry(row: RowMapping) -> dict[Any, Any]:
    """Return the stream entry of a journal row. It continues the trace of its request."""
    movement = {**row, "id_transaksi": row["id"]}
    with span("send", movement):
        movement["traceparent"] = current_traceparent() or row["traceparent"]
    return to_entry(movement)
