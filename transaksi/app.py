"""Business logic: the rules, the teller, the PIN check, and the bank that uses them.

Amounts are whole rupiah. Nothing here knows HTTP.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import bcrypt
from cachetools import TTLCache
from sqlalchemy import Connection, Engine, RowMapping
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from common.stream import JenisTransaksi
from common.telemetry import error_summary, log
from transaksi import datastore
from transaksi.datastore import Database, Key

T = TypeVar("T")


MAX_SALDO = 2**53 - 1  # JSON clients read integers up to this exactly (RFC 8259, section 6)

# ---------------------------------------------------------------- errors


class BankError(Exception):
    """Why the bank did not do what was asked. The text is for the log."""


class Refused(BankError):
    """A rule forbids the movement. No money was moved."""


class UnknownAccount(Refused):
    """The account is not the customer's own, whether it exists or not."""


class InsufficientBalance(Refused):
    """A withdrawal of more than the balance."""


class BalanceLimit(Refused):
    """A deposit that would lift the balance over `MAX_SALDO`."""


class KeyReused(Refused):
    """The idempotency key belongs to another movement."""


class NotAuthenticated(BankError):
    """The account number or PIN is missing or wrong, or the account is locked."""


class NotExecuted(BankError):
    """The bank could not do it now.

    This attempt moved no money. An earlier one with the same key may have.
    """


class BadData(NotExecuted):
    """PostgreSQL rejects the movement, for example because of a constraint."""


class OutcomeUnknown(BankError):
    """Nobody can tell whether money was moved. The same key may be repeated."""


# ---------------------------------------------------------------- rules


@dataclass(frozen=True, eq=False)  # two equal deposits are two
class Movement:
    """A requested deposit ("tabung") or withdrawal ("tarik")."""

    jenis_transaksi: JenisTransaksi
    no_rekening: str
    nominal: int
    idempotency_key: str | None = None
    traceparent: str | None = None

    @property
    def key(self) -> Key | None:
        """What may move money only once: the account with the idempotency key."""
        return (self.no_rekening, self.idempotency_key) if self.idempotency_key else None


@dataclass(frozen=True)
class Receipt:
    """What the customer gets for an accepted movement: its id and the balance after it.

    `replayed` tells that the movement was accepted earlier, under the same key.
    """

    id_transaksi: int
    saldo: int
    replayed: bool


def check_owner(customer: str, no_rekening: str) -> None:
    """Raise UnknownAccount unless the account is the customer's own."""
    if no_rekening != customer:
        raise UnknownAccount("not the customer's account")


def balance_after(movement: Movement, balances: dict[str, int]) -> int:
    """Return the balance after a movement, given those of the accounts that exist.

    Raises InsufficientBalance, BalanceLimit, or NotAuthenticated if the account was deleted
    since its PIN was cached.
    """
    if movement.no_rekening not in balances:
        raise NotAuthenticated("no such account")
    sign = {"tabung": 1, "tarik": -1}[movement.jenis_transaksi]
    balance = balances[movement.no_rekening] + sign * movement.nominal
    if balance < 0:
        raise InsufficientBalance("insufficient balance")
    if balance > MAX_SALDO:
        raise BalanceLimit("balance limit")
    return balance


def replay(movement: Movement, earlier: RowMapping) -> Receipt | KeyReused:
    """Return the receipt of the earlier movement with the same key, unless it was another."""
    for name in ("jenis_transaksi", "nominal"):
        if earlier[name] != getattr(movement, name):
            return KeyReused("key of another movement")
    return Receipt(earlier["id"], earlier["saldo_akhir"], replayed=True)


# ---------------------------------------------------------------- the teller


@dataclass(eq=False)
class Pending:
    """A movement that waits for the teller, and the future that its request awaits."""

    movement: Movement
    future: asyncio.Future[Receipt | BankError]
    taken: bool = False  # from then on, only the database knows the outcome


@dataclass(frozen=True)
class Posted:
    """What became of a batch: an outcome for each movement, and the new journal rows."""

    outcomes: dict[Movement, Receipt | BankError]
    journal: list[RowMapping]


class Teller:
    """Posts all movements that wait in one transaction (group commit).

    While one batch is in the database, new requests queue up and are posted together. Answers
    are sent after the commit. `on_commit` gets the journal rows of each batch.
    """

    MAX_WAITING = 1000
    MAX_BATCH = 512
    GATHER_TURNS = 4  # of the event loop, in which other requests may join a batch

    def __init__(
        self,
        database: Database,
        on_commit: Callable[[list[RowMapping]], None],
    ) -> None:
        self._database = database
        self._on_commit = on_commit
        self._queue: asyncio.Queue[Pending] = asyncio.Queue(self.MAX_WAITING)

    def waiting(self) -> int:
        """Return how many movements wait."""
        return self._queue.qsize()

    async def submit(self, movement: Movement) -> Receipt:
        """Have a movement posted, and wait for the outcome.

        Raises InsufficientBalance, BalanceLimit or KeyReused if it is refused, NotExecuted
        if too many wait, OutcomeUnknown if the request times out after it was taken.
        """
        pending = Pending(movement, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(pending)
            outcome = await pending.future
        except asyncio.QueueFull:
            raise NotExecuted("queue full") from None
        except asyncio.CancelledError:
            if pending.taken:
                raise OutcomeUnknown("timeout in the database") from None
            raise
        if isinstance(outcome, BankError):
            raise outcome
        return outcome

    async def run(self) -> None:
        """Post batches until cancelled."""
        while True:
            batch = await self._next_batch()
            if not batch:  # all have timed out
                continue
            movements = [pending.movement for pending in batch]
            posted = await self._database.run(post_batch, movements)
            for pending in batch:
                if not pending.future.done():  # otherwise its request has timed out
                    pending.future.set_result(posted.outcomes[pending.movement])
            self._on_commit(posted.journal)

    async def _next_batch(self) -> list[Pending]:
        """Wait for a movement, and take all that wait, except those that have timed out."""
        waiting = [await self._queue.get()]
        for _ in range(self.GATHER_TURNS):
            await asyncio.sleep(0)
        while len(waiting) < self.MAX_BATCH and not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        batch = [pending for pending in waiting if not pending.future.done()]
        for pending in batch:
            pending.taken = True
        return batch


def post_batch(engine: Engine, movements: Sequence[Movement]) -> Posted:
    """Post movements together, or each alone if PostgreSQL rejects their data.

    So only the bad one fails.
    """
    try:
        return post(engine, movements)
    except BankError as error:
        if not isinstance(error, BadData) or len(movements) == 1:
            return Posted(dict.fromkeys(movements, error), [])
    posted = Posted({}, [])
    for movement in movements:
        alone = post_batch(engine, [movement])
        posted.outcomes.update(alone.outcomes)
        posted.journal.extend(alone.journal)
    return posted


def post(engine: Engine, movements: Sequence[Movement]) -> Posted:
    """Post movements in one transaction, in the order of their arrival.

    It commits even if all are replays: the first commit of a replayed movement may still wait
    for the standby. PostgreSQL acknowledges commits in order, and row locks make this one wait.

    Raises NotExecuted for any error before the commit, BadData if PostgreSQL rejects the
    data, and OutcomeUnknown for any error from the commit on.
    """
    committing = False
    try:
        with engine.connect() as connection:
            posted = decide(connection, movements)
            committing = True
            connection.commit()
            return posted
    except Exception as error:
        if committing:
            raise OutcomeUnknown(reason_of(error)) from error
        if isinstance(error, DataError | IntegrityError):
            raise BadData(reason_of(error)) from error
        raise NotExecuted(reason_of(error)) from error


def decide(connection: Connection, movements: Sequence[Movement]) -> Posted:
    """Apply the rules to movements, and record the accepted ones.

    A repeated key is a replay, also of a movement in the same batch.
    """
    balances = datastore.lock_balances(connection, {m.no_rekening for m in movements})
    by_key = datastore.find_by_keys(connection, [m.key for m in movements if m.key])
    outcomes: dict[Movement, Receipt | BankError] = {}
    accepted: dict[Movement, dict[str, Any]] = {}  # with the values of its journal row
    replays: list[Movement] = []
    keys = set(by_key)
    for movement in movements:
        if movement.key in keys:
            replays.append(movement)
            continue
        try:
            saldo = balance_after(movement, balances)
        except BankError as refusal:
            outcomes[movement] = refusal
            continue
        balances[movement.no_rekening] = saldo
        accepted[movement] = vars(movement) | {"saldo_akhir": saldo}
        if movement.key:
            keys.add(movement.key)
    journal = datastore.record(connection, list(accepted.values()))
    for movement, row in zip(accepted, journal, strict=True):
        outcomes[movement] = Receipt(row["id"], row["saldo_akhir"], replayed=False)
        by_key[movement.key] = row
    for movement in replays:
        outcomes[movement] = replay(movement, by_key[movement.key])
    return Posted(outcomes, journal)


def reason_of(error: Exception) -> str:
    """Say why a call of the database failed. Log anything but a DBAPIError: it is unexpected."""
    if not isinstance(error, DBAPIError):
        log.exception("unexpected error")
    return error_summary(error)


# ---------------------------------------------------------------- the PIN check


class PinCheck:
    """Checks PINs against their bcrypt hashes, and caches the correct ones.

    Each attempt is counted in the database before it is compared, so concurrent guesses, in
    any number of processes, cannot exceed the limit.
    """

    MAX_RUNNING = 64
    MAX_CACHED = 100_000
    # Compared for unknown and locked accounts, so that timing does not reveal the cause. It
    # is no hash of any known PIN, and a match would be refused as well.
    DUMMY_HASH = "$2b$10$" + 53 * "."

    def __init__(
        self,
        database: Database,
        *,
        max_failures: int,
        lock_minutes: int,
        cache_ttl_s: int,
    ) -> None:
        self._database = database
        self._max_failures = max_failures
        self._lock_minutes = lock_minutes
        self._secret = secrets.token_bytes(32)
        self._cached: TTLCache[str, bytes] = TTLCache(self.MAX_CACHED, cache_ttl_s)
        self._running: dict[bytes, asyncio.Future[None]] = {}

    async def check(self, account: str, pin: str) -> None:
        """Return if the PIN is correct. Raises NotAuthenticated or NotExecuted."""
        # Hashed with a secret of this process, so that no PIN is kept in memory.
        digest = hashlib.blake2b(f"{account}:{pin}".encode(), key=self._secret).digest()
        if self._cached.get(account) == digest:
            return
        check = self._running.get(digest)  # equal checks share one
        if not check:
            if len(self._running) >= self.MAX_RUNNING:
                raise NotExecuted("too many PIN checks")
            check = self._database.run(self._compare, account, pin)
            self._running[digest] = check
            check.add_done_callback(partial(self._end, account, digest))
        await asyncio.wait([check])  # unlike `await check`, a timeout does not cancel it
        check.result()

    def forget(self, account: str) -> None:
        """Remove an account from the cache."""
        self._cached.pop(account, None)

    def _end(self, account: str, digest: bytes, check: asyncio.Future[None]) -> None:
        del self._running[digest]
        if not check.cancelled() and not check.exception():
            self._cached[account] = digest

    def _compare(self, engine: Engine, account: str, pin: str) -> None:
        """Raise NotAuthenticated unless the PIN is correct. Costs one bcrypt in any case."""
        attempt = datastore.count_attempt(engine, account, self._max_failures, self._lock_minutes)
        pin_hash: str = attempt["pin_hash"] if attempt else self.DUMMY_HASH
        correct = bcrypt.checkpw(pin.encode(), pin_hash.encode())
        if not attempt:
            raise NotAuthenticated("unknown account or locked")
        if not correct:
            if attempt["pin_gagal"] >= self._max_failures:
                log.warning("account locked")
            raise NotAuthenticated("wrong PIN")
        datastore.reset_attempts(engine, account, attempt["pin_gagal"])


# ---------------------------------------------------------------- the bank


@dataclass(frozen=True)
class Page:
    """Booked movements, newest first. `before` asks for the next page; None on the last."""

    movements: Sequence[RowMapping]
    before: int | None


@dataclass(frozen=True)
class Bank:
    """What a customer may ask for. Every method may raise NotExecuted, `move` OutcomeUnknown."""

    teller: Teller
    pins: PinCheck
    reads: Database
    health: Database  # separate, because anybody may ask, and as often as they like

    async def authenticate(self, account: str, pin: str) -> None:
        """Return if the PIN is correct. Raises NotAuthenticated."""
        await or_not_executed(self.pins.check(account, pin))

    async def move(self, customer: str, movement: Movement) -> Receipt:
        """Deposit or withdraw. Raises UnknownAccount, and what `Teller.submit` raises."""
        check_owner(customer, movement.no_rekening)
        try:
            return await self.teller.submit(movement)
        except NotAuthenticated:
            self.pins.forget(customer)
            raise

    async def balance(self, customer: str) -> int:
        """Return the balance. Raises NotAuthenticated if the account was deleted."""
        balance = await or_not_executed(self.reads.run(datastore.find_balance, customer))
        if balance is None:
            self.pins.forget(customer)
            raise NotAuthenticated("no such account")
        return balance

    async def statement(self, customer: str, before: int | None, limit: int) -> Page:
        """Return a page of booked movements, those with ids below `before`."""
        find = datastore.find_mutations
        rows = await or_not_executed(self.reads.run(find, customer, before, limit + 1))
        if not rows:
            await self.balance(customer)  # raises if the account was deleted
        has_more = len(rows) > limit
        return Page(rows[:limit], rows[limit - 1]["id_transaksi"] if has_more else None)

    async def ping(self) -> None:
        """Raise NotExecuted unless PostgreSQL takes writes."""
        await or_not_executed(self.health.run(datastore.ping))


async def or_not_executed(call: Awaitable[T]) -> T:
    """Await a call of the database. Raises NotExecuted if it fails for any reason."""
    try:
        return await call
    except BankError:
        raise
    except Exception as error:
        raise NotExecuted(reason_of(error)) from error
