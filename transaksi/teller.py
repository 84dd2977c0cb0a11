"""The teller: many requests, one transaction (group commit).

Each request queues its command and awaits the answer. While one batch is in the database the next one
gathers, and is then posted in one transaction: a few statements and one wait for the disk for all of it.
Answers go out after the commit, never before.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import Outage, data_refused, describe
from transaksi import datastore
from transaksi.app import Command, Movement, Refusal, Replay, Result, decide, unavailable, unknown_outcome
from transaksi.datastore import Database

log = logging.getLogger(__name__)

BATCH = 512


@dataclass(slots=True, eq=False)
class Ticket:
    """A queued command, and where its answer is awaited."""

    command: Command
    answer: asyncio.Future[Movement | Replay]
    taken: bool = False


class Teller:
    """The queue of one process. `database` has one thread; `committed` gets the movements of each batch."""

    def __init__(
        self,
        database: Database,
        postgres: Outage,
        max_queue: int,
        committed: Callable[[Sequence[Movement]], None],
    ) -> None:
        self._database = database
        self._postgres = postgres
        self._max_queue = max_queue
        self._committed = committed
        self._queue: deque[Ticket] = deque()
        self._work: asyncio.Task[None] | None = None

    async def submit(self, command: Command) -> Movement | Replay:
        """Carry out a command. Raises `Refusal`.

        The time limit is the caller's. When its task is cancelled, a command that was still queued was not
        carried out; the outcome of one that was taken is unknown.
        """
        if len(self._queue) >= self._max_queue:
            raise unavailable("queue full")
        ticket = Ticket(command, asyncio.get_running_loop().create_future())
        self._queue.append(ticket)
        if not self._work or self._work.done():
            self._work = asyncio.create_task(self._post_batches())
        try:
            return await ticket.answer
        except asyncio.CancelledError:
            if not ticket.answer.cancelled():  # the answer came at the same moment
                return ticket.answer.result()
            raise unknown_outcome() if ticket.taken else unavailable("still queued") from None

    async def close(self) -> None:
        """Wait until every command is answered, 2 s at most."""
        if self._work:
            await asyncio.wait([self._work], timeout=2)

    async def _post_batches(self) -> None:
        """Post batches until the queue is empty, each before the answers to the last one go out."""
        batch: list[Ticket] = []
        results: list[Result] = []
        while self._queue or batch:
            taken = self._take()
            posting = self._database.run(self._settle, [t.command for t in taken]) if taken else None
            for ticket, result in zip(batch, results, strict=True):
                if ticket.answer.done():  # cancelled
                    continue
                if isinstance(result, Refusal):
                    ticket.answer.set_exception(result)
                else:
                    ticket.answer.set_result(result)
            self._committed([result for result in results if isinstance(result, Movement)])
            batch, results = taken, await posting if posting else []

    def _take(self) -> list[Ticket]:
        taken: list[Ticket] = []
        while self._queue and len(taken) < BATCH:
            ticket = self._queue.popleft()
            if not ticket.answer.done():  # cancelled
                ticket.taken = True
                taken.append(ticket)
        return taken

    def _settle(self, engine: Engine, commands: list[Command], retry: bool = True) -> list[Result]:
        """One result per command, whatever the database does."""
        try:
            results = self._post(engine, commands)
        except DBAPIError as error:  # before COMMIT was sent
            if error.connection_invalidated and retry:  # a stale connection of the pool
                return self._settle(engine, commands, retry=False)
            if not data_refused(error):
                self._postgres.begin(error)
            elif len(commands) > 1:
                return [self._settle(engine, [command])[0] for command in commands]
            else:
                log.error("command refused by the database", extra=describe(error))
            return [unavailable("database") for _ in commands]
        except Exception:
            log.exception("unexpected error")
            return [unknown_outcome() for _ in commands]
        return results

    def _post(self, engine: Engine, commands: list[Command]) -> list[Result]:
        """Post a batch in one transaction. Raises `DBAPIError` if the database fails before COMMIT."""
        with engine.connect() as connection:
            balances = datastore.lock_balances(connection, {c.no_rekening for c in commands})
            keys = [(c.no_rekening, c.idempotency_key) for c in commands if c.idempotency_key]
            recorded = datastore.find_keys(connection, keys) if keys else {}
            results = decide(commands, balances, recorded)
            if movements := [result for result in results if isinstance(result, Movement)]:
                datastore.record(connection, movements, balances)
                try:
                    connection.commit()
                except DBAPIError as error:
                    self._postgres.begin(error)
                    return [unknown_outcome() for _ in commands]
        self._postgres.end()
        return results
