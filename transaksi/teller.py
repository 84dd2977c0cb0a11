"""The teller: many requests, one transaction (group commit).

Each request queues its command and awaits the answer. While one batch is in the database the next one
gathers, and is then posted in one transaction: a few statements and one wait for the disk for all of it.
Answers go out after the commit, never before.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import Database, data_refused, describe
from transaksi import datastore
from transaksi.app import Command, Movement, Refusal, Replay, Result, decide

log = logging.getLogger(__name__)

BATCH = 512

Ticket = tuple[asyncio.Future[Movement | Replay], Command]  # the answer that its caller awaits, the command


@dataclass(eq=False)
class Teller:
    """The queue of one process. `database` has one thread; `committed` gets the movements of each batch."""

    database: Database
    max_queue: int
    committed: Callable[[Sequence[Movement]], None]
    queue: deque[Ticket] = field(default_factory=deque)
    work: asyncio.Task[None] | None = None

    async def submit(self, command: Command) -> Movement | Replay:
        """Carry out a command. Raises `Refusal`.

        The time limit is the caller's. When its task is cancelled, a command that is still queued was not
        carried out; the outcome of one that is in the database is unknown.
        """
        if len(self.queue) >= self.max_queue:
            raise Refusal("unavailable", "queue full")
        answer: asyncio.Future[Movement | Replay] = asyncio.get_running_loop().create_future()
        ticket = answer, command
        self.queue.append(ticket)
        if not self.work or self.work.done():
            self.work = asyncio.create_task(self._post_batches())
        try:
            return await answer
        except asyncio.CancelledError:
            if not answer.cancelled():  # the answer came at the same moment
                return answer.result()
            if ticket not in self.queue:
                raise Refusal("unknown_outcome", "time limit") from None
            self.queue.remove(ticket)
            raise Refusal("unavailable", "still queued") from None

    async def close(self) -> None:
        """Wait until every command is answered, 2 s at most."""
        if self.work:
            await asyncio.wait([self.work], timeout=2)

    async def _post_batches(self) -> None:
        """Post batches until the queue is empty. The next starts before the answers of the last go out."""
        batch: list[Ticket] = []
        results: list[Result] = []
        while self.queue or batch:
            taken = [self.queue.popleft() for _ in range(min(BATCH, len(self.queue)))]
            commands = [command for _, command in taken]
            posting = self.database.run(self._settle, commands) if taken else None
            for (answer, _), result in zip(batch, results, strict=True):
                if answer.done():  # cancelled
                    continue
                if isinstance(result, Refusal):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)
            self.committed([result for result in results if isinstance(result, Movement)])
            batch = taken
            results = await posting if posting else []

    def _settle(self, engine: Engine, commands: list[Command], retry: bool = True) -> list[Result]:
        """One result per command, whatever the database does."""
        try:
            return self._post(engine, commands)
        except DBAPIError as error:  # before COMMIT was sent
            if error.connection_invalidated and retry:  # a stale connection of the pool
                return self._settle(engine, commands, retry=False)
            if data_refused(error) and len(commands) > 1:
                middle = len(commands) // 2  # so that only the refused one fails
                return self._settle(engine, commands[:middle]) + self._settle(engine, commands[middle:])
            return [Refusal("unavailable", describe(error)) for _ in commands]
        except Exception:
            log.exception("unexpected error")
            return [Refusal("unknown_outcome", "unexpected error") for _ in commands]

    def _post(self, engine: Engine, commands: list[Command]) -> list[Result]:
        """Post a batch in one transaction. Raises `DBAPIError` if the database fails before COMMIT."""
        with engine.connect() as connection:
            balances = datastore.lock_balances(connection, {c.no_rekening for c in commands})
            keys = [(c.no_rekening, c.idempotency_key) for c in commands if c.idempotency_key]
            recorded = datastore.find_keys(connection, keys) if keys else {}
            results = decide(commands, balances, recorded)
            if movements := [result for result in results if isinstance(result, Movement)]:
                datastore.record(connection, movements)
                try:
                    connection.commit()
                except DBAPIError as error:
                    return [Refusal("unknown_outcome", describe(error)) for _ in commands]
            return results
