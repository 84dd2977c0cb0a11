"""The teller: many requests, one transaction (group commit).

Each request queues its movement and awaits the answer. While one batch is in the database the next one
gathers, and is then posted in one transaction: a few statements and one wait for the disk for all of it.
Answers go out after the commit, never before.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import Database, data_refused, describe
from transaksi import datastore
from transaksi.app import Movement, Refusal, Result, decide

log = logging.getLogger(__name__)

BATCH = 512

Ticket = tuple[asyncio.Future[Result], Movement]  # the answer that its caller awaits, and the movement


@dataclass(eq=False)
class Teller:
    """The queue of one process. `database` has one thread; `committed` gets the movements of each batch."""

    database: Database
    max_queue: int
    committed: Callable[[list[Movement]], None]
    queue: deque[Ticket] = field(default_factory=deque)
    work: asyncio.Task[None] | None = None

    async def submit(self, movement: Movement) -> Movement:
        """Carry out a movement. Returns it, or the one that its key made before. Raises `Refusal`.

        The time limit is the caller's. When its task is cancelled, a movement that is still queued was not
        carried out; the outcome of one that is in the database is unknown.
        """
        if len(self.queue) >= self.max_queue:
            raise Refusal("unavailable", "queue full")
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        ticket = answer, movement
        self.queue.append(ticket)
        if not self.work or self.work.done():
            self.work = asyncio.create_task(self._post_batches())
        try:
            result = await answer
        except asyncio.CancelledError:
            if ticket in self.queue:
                self.queue.remove(ticket)
                raise Refusal("unavailable", "still queued") from None
            if answer.cancelled():  # not if the answer came at the same moment
                raise Refusal("unknown_outcome", "time limit") from None
            result = answer.result()
        if isinstance(result, Refusal):
            raise result
        return result

    async def _post_batches(self) -> None:
        """Post batches until the queue is empty."""
        while self.queue:
            batch = [self.queue.popleft() for _ in range(min(BATCH, len(self.queue)))]
            results = await self.database.run(self._settle, [movement for _, movement in batch])
            for (answer, _), result in zip(batch, results, strict=True):
                if not answer.done():  # otherwise its caller waits no more
                    answer.set_result(result)
            self.committed([m for (_, m), result in zip(batch, results, strict=True) if result is m])

    def _settle(self, engine: Engine, movements: list[Movement], retry: bool = True) -> list[Result]:
        """One result per movement, whatever the database does."""
        try:
            return self._post(engine, movements)
        except DBAPIError as error:  # before COMMIT, whose own error `_post` answers
            if error.connection_invalidated and retry:  # a stale connection of the pool
                return self._settle(engine, movements, retry=False)
            if data_refused(error) and len(movements) > 1:
                middle = len(movements) // 2  # so that only the refused one fails
                return self._settle(engine, movements[:middle]) + self._settle(engine, movements[middle:])
            return [Refusal("unavailable", describe(error)) for _ in movements]
        except Exception:
            log.exception("unexpected error")
            return [Refusal("unknown_outcome", "unexpected error") for _ in movements]

    def _post(self, engine: Engine, movements: list[Movement]) -> list[Result]:
        """Post a batch in one transaction. Raises `DBAPIError` if the database fails before COMMIT."""
        with engine.connect() as connection:
            balances = datastore.lock_balances(connection, {m.no_rekening for m in movements})
            keyed = [m for m in movements if m.idempotency_key]
            made = datastore.find_keys(connection, keyed) if keyed else {}
            results = [decide(movement, balances, made) for movement in movements]
            if accepted := [m for m, result in zip(movements, results, strict=True) if result is m]:
                datastore.record(connection, accepted)
                try:
                    connection.commit()
                except DBAPIError as error:
                    return [Refusal("unknown_outcome", describe(error)) for _ in movements]
            return results
