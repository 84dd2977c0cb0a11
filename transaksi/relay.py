"""The relay: committed movements to the Redis Stream, at least once.

The teller hands over each batch in memory, right after its commit. What cannot be sent is dropped: a
movement stays in the outbox until the mutation book has it. Every now and then the relay looks there for
movements that were lost on the way, and sends them again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import Outage
from common.telemetry import masked, message_span
from transaksi import datastore
from transaksi.app import Movement
from transaksi.datastore import Database

log = logging.getLogger(__name__)

STREAM = "mutasi"
BATCH = 1000
GATHER_S = 0.01  # larger batches cost fewer fsyncs, and fewer transactions in mutasi
MAX_WAITING = 10_000


@dataclass(eq=False)
class Relay:
    """The relay of one process. `database` has one thread, which also talks to Redis.

    Nothing is sent while the stream has `max_stream` entries. A movement that is not booked after twice
    `resend_after_s` is sent again.
    """

    database: Database
    redis: Redis
    max_stream: int
    resend_after_s: int
    waiting: deque[tuple[float, Movement]] = field(default_factory=deque)
    work: asyncio.Task[None] | None = None
    postgres: Outage = field(default_factory=lambda: Outage(log, "PostgreSQL"))
    outage: Outage = field(default_factory=lambda: Outage(log, "Redis"))
    alarm: int = logging.INFO

    def hand_over(self, movements: Sequence[Movement]) -> None:
        """Take committed movements; those for which there is no room stay in the outbox."""
        now = asyncio.get_running_loop().time()
        self.waiting.extend((now, m) for m in movements[: MAX_WAITING - len(self.waiting)])
        if self.waiting and (not self.work or self.work.done()):
            self.work = asyncio.create_task(self._send_waiting())

    async def close(self) -> None:
        """Wait until all is sent, 1 s at most."""
        if self.work:
            await asyncio.wait([self.work], timeout=1)

    async def _send_waiting(self) -> None:
        while self.waiting:
            await asyncio.sleep(GATHER_S)
            batch = [self.waiting.popleft() for _ in range(min(BATCH, len(self.waiting)))]
            # Older ones may have been sent again by `_resend` meanwhile.
            since = asyncio.get_running_loop().time() - self.resend_after_s
            await self.database.run(self._send, [m for handed_over, m in batch if handed_over > since])

    async def watch(self) -> None:
        """Look for lost movements every half of `resend_after_s`, until cancelled."""
        while True:
            while await self.database.run(self._resend) == BATCH:
                pass
            await asyncio.sleep(self.resend_after_s / 2)

    def _send(self, _: Engine, movements: Sequence[Movement]) -> None:
        """Add movements to the stream: all or none of them, with one fsync."""
        try:
            if not movements or self.redis.xlen(STREAM) >= self.max_stream:
                return
            with ExitStack() as spans, self.redis.pipeline(transaction=True) as pipe:
                for movement in movements:
                    pipe.xadd(STREAM, message(movement, spans))
                pipe.execute()
            self.outage.end()
            log.debug("batch sent to the stream", extra={"count": len(movements)})
        except RedisError as error:
            self.outage.begin(error)
        except Exception:
            log.exception("unexpected error")

    def _resend(self, engine: Engine) -> int:
        """Send up to `BATCH` lost movements again. Returns how many.

        While the stream is empty or its oldest entry is young, nothing is just late: a row that was sent long
        ago and is not booked was lost. It is marked, committed and then sent: no row is locked while Redis is
        waited for, and if sending fails, it is tried again later.
        """
        try:
            behind_s = datastore.outbox_age(engine)
            self.postgres.end()
            self._report(behind_s)
            length, age_s = self._stream()
            if not behind_s:  # only an empty outbox proves that XADD works: a full Redis still answers reads
                self.outage.end()
            if length >= self.max_stream or age_s >= self.resend_after_s:
                return 0
            lost = datastore.mark_lost(engine, 2 * self.resend_after_s, BATCH)
            if lost:
                log.info("movements sent from the outbox", extra={"count": len(lost)})
                self._send(engine, lost)
            return len(lost)
        except RedisError as error:
            self.outage.begin(error)
        except DBAPIError as error:
            self.postgres.begin(error)
        except Exception:
            log.exception("unexpected error")
        return 0

    def _stream(self) -> tuple[int, float]:
        """The stream's length, and the age in seconds of its oldest entry, by Redis' own clock."""
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.xlen(STREAM)
            pipe.xrange(STREAM, count=1)
            pipe.time()
            length, oldest, (now, _) = pipe.execute()
        return length, now - int(oldest[0][0].split(b"-")[0]) / 1000 if oldest else 0.0

    def _report(self, behind_s: float) -> None:
        """Log once when the outbox falls behind, once when far behind, and once when it has caught up."""
        alarm, text = logging.INFO, "outbox has caught up"
        if behind_s > 10 * self.resend_after_s:
            alarm, text = logging.ERROR, "outbox is far behind"
        elif behind_s > 3 * self.resend_after_s:
            alarm, text = logging.WARNING, "outbox is behind"
        if alarm > self.alarm or alarm == logging.INFO < self.alarm:
            log.log(alarm, text, extra={"age_s": round(behind_s)})
            self.alarm = alarm


def message(movement: Movement, spans: ExitStack) -> dict[Any, Any]:
    """The stream entry of a movement. Its span, a child of the request's, ends with `spans`."""
    command = movement.command
    entry: dict[str, Any] = {
        "id_transaksi": movement.id_transaksi,
        "no_rekening": command.no_rekening,
        "jenis_transaksi": command.jenis_transaksi,
        "nominal": command.nominal,
        "tanggal_transaksi": str(movement.tanggal_transaksi).replace(" ", "T"),
    }
    if command.traceparent:
        facts = entry | {"no_rekening": masked(command.no_rekening)}
        entry["traceparent"] = spans.enter_context(message_span("send", STREAM, command.traceparent, facts))
    return entry
