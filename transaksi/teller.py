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
from transaksi.app import Command, Movement, Refusal, Replay, Result, Unavailable, Unknown, decide
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
        self._max_queue = max_queue
        self._committed = committed
        self._queue: deque[Ticket] = deque()
        self._work: asyncio.Task[None] | None = None
        self._postgres = postgres

    async def submit(self, command: Command) -> Movement | Replay:
        """Carry out a command.

        Raises a `Refusal`: one of the rules', `Unavailable` if it was not carried out (queue full,
        database away), `Unknown` if nobody can tell. The time limit is the caller's: when its task is
        cancelled, the command was not carried out if it was still queued, and unknown otherwise.
        """
        if len(self._queue) >= self._max_queue:
            raise Unavailable("queue full")
        ticket = Ticket(command, asyncio.get_running_loop().create_future())
        self._queue.append(ticket)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._post_batches())
        try:
            return await ticket.answer
        except asyncio.CancelledError:
            if not ticket.answer.cancelled():  # the answer came at the same moment
                return ticket.answer.result()
            raise (Unknown if ticket.taken else Unavailable) from None

    async def close(self) -> None:
        """Wait until every command is answered, 2 s at most."""
        if self._work:
            await asyncio.wait([self._work], timeout=2)

    async def _post_batches(self) -> None:
        """Post batches until the queue is empty, each before the answers of the last one go out."""
        batch: list[Ticket] = []
        results: list[Result] = []
        while self._queue or batch:
            taken = self._take()
            posting = self._database.run(self._settle, [t.command for t in taken]) if taken else None
            self._deliver(batch, results)
            batch, results = taken, await posting if posting else []

    def _take(self) -> list[Ticket]:
        batch: list[Ticket] = []
        while self._queue and len(batch) < BATCH:
            ticket = self._queue.popleft()
            if not ticket.answer.done():  # cancelled
                ticket.taken = True
                batch.append(ticket)
        return batch

    def _deliver(self, batch: Sequence[Ticket], results: Sequence[Result]) -> None:
        for ticket, result in zip(batch, results, strict=True):
            if ticket.answer.done():  # cancelled
                continue
            if isinstance(result, Refusal):
                ticket.answer.set_exception(result)
            else:
                ticket.answer.set_result(result)
        self._committed([result for result in results if isinstance(result, Movement)])

    def _settle(self, engine: Engine, commands: list[Command], retry: bool = True) -> list[Result]:
        """One result per command, whatever the database does."""
        try:
            results = post(engine, commands)
            self._postgres.end()
            return results
        except Unknown as unknown:
            self._postgres.begin(unknown.__cause__ or unknown)
            return [Unknown() for _ in commands]
        except DBAPIError as error:
            if error.connection_invalidated and retry:  # a stale connection: nothing has happened yet
                return self._settle(engine, commands, retry=False)
            if not data_refused(error):
                self._postgres.begin(error)
            elif len(commands) > 1:  # find the bad one
                return [self._settle(engine, [command])[0] for command in commands]
            else:
                log.error("command refused by the database", extra=describe(error))
            return [Unavailable() for _ in commands]
        except Exception:
            log.exception("unexpected error")
            return [Unknown() for _ in commands]


def post(engine: Engine, commands: list[Command]) -> list[Result]:
    """Post a batch in one transaction.

    Raises `Unknown` if COMMIT failed, `DBAPIError` if the database failed before it.
    """
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
                raise Unknown from error
    return results
