"""The PIN check: who is this, said by account number and PIN.

A right PIN is remembered for a short time, so that the next request costs microseconds. All others cost one bcrypt in
a small pool with a bounded queue: guessing cannot stop the customers who are already in. Failures in a row lock the
account, in the database, so that it holds over processes and restarts.
"""

import asyncio
import base64
import binascii
import hashlib
import logging
import os
import queue
import re
import secrets
import threading
import time
from contextlib import suppress
from datetime import timedelta
from weakref import WeakValueDictionary

import bcrypt
from cachetools import TTLCache
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from servers import describe
from telemetry import masked
from transaksi import datastore
from transaksi.app import Unavailable

log = logging.getLogger(__name__)

# Half of the cores: the others go on serving those who are in.
THREADS = max(1, (os.cpu_count() or 1) // 2)
MAX_CHECKS = 64  # waiting or running; more are turned away
MAX_REMEMBERED = 100_000
FLOOR_S = 0.3  # no refusal comes earlier after arrival, so that its cause cannot be told from its time

CREDENTIALS = re.compile(rb"([0-9]{10,16}):([0-9]{6})")
RIGHT, UNAVAILABLE = "right", "unavailable"
DUMMY_HASH = bcrypt.hashpw(secrets.token_bytes(16), bcrypt.gensalt(10))


class NotAuthenticated(Exception):
    """No valid credentials. The reason is for the log: the client gets the same answer for all of them."""


def parse(authorization: bytes) -> tuple[str, bytes]:
    """Account number and PIN of an Authorization header (RFC 7617); raises `NotAuthenticated`."""
    scheme, _, token = authorization.partition(b" ")
    try:
        credentials = base64.b64decode(token.strip(), validate=True)
    except binascii.Error:
        credentials = b""
    match = CREDENTIALS.fullmatch(credentials)
    if scheme.lower() != b"basic" or not match:
        raise NotAuthenticated("malformed")
    return match[1].decode(), match[2]


class PinCheck:
    """The checks of one process.

    `ttl` is for how many seconds a right PIN is remembered (0: not at all); `max_failures` in a row lock the account
    for `lock_minutes`.
    """

    def __init__(self, engine: Engine, ttl: int, max_failures: int, lock_minutes: int) -> None:
        self._engine = engine
        self._max_failures = max_failures
        self._locked_for = timedelta(minutes=lock_minutes)
        self._key = secrets.token_bytes(32)
        self._remembered: TTLCache[bytes, str] = TTLCache(MAX_REMEMBERED, ttl)
        self._running: dict[bytes, asyncio.Task[str]] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._jobs: queue.SimpleQueue[tuple[asyncio.Future[str], str, bytes] | None] = queue.SimpleQueue()
        self._stopping = False
        self._threads = [threading.Thread(target=self._work, name="pin", daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads: one that the end of the process finds within bcrypt would abort it."""
        self._stopping = True
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + 1
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    async def check(self, no_rekening: str, pin: bytes, arrived: float, deadline: float) -> None:
        """Return if the PIN is the account's. `arrived` is of time.monotonic(), `deadline` of the event loop's clock.

        Raises `NotAuthenticated`, and `Unavailable` where it cannot be told by `deadline`.
        """
        # Keyed, so that no PIN is kept; with the colon, so that no account and PIN can be read as another pair.
        secret = hashlib.blake2b(b"%s:%s" % (no_rekening.encode(), pin), key=self._key).digest()
        if secret in self._remembered:
            return
        task = self._check_once(secret, no_rekening, pin)
        try:
            async with asyncio.timeout_at(deadline):
                verdict = await asyncio.shield(task) if task else UNAVAILABLE
            if verdict != RIGHT:
                await asyncio.sleep(arrived + FLOOR_S - time.monotonic())
        except (TimeoutError, asyncio.CancelledError):  # or the server is stopping
            raise Unavailable from None
        if verdict != RIGHT:
            raise Unavailable if verdict == UNAVAILABLE else NotAuthenticated(verdict)

    def _check_once(self, secret: bytes, no_rekening: str, pin: bytes) -> asyncio.Task[str] | None:
        """The check of these credentials that is under way, or a new one; None where too many are."""
        if task := self._running.get(secret):
            return task
        if len(self._running) >= MAX_CHECKS:
            return None
        task = self._running[secret] = asyncio.create_task(self._check(secret, no_rekening, pin))
        task.add_done_callback(lambda _: self._running.pop(secret))
        return task

    async def _check(self, secret: bytes, no_rekening: str, pin: bytes) -> str:
        turn = self._turns.setdefault(no_rekening, asyncio.Lock())
        async with turn:  # one at a time, or parallel guesses would outrun the count of failures
            future = asyncio.get_running_loop().create_future()
            self._jobs.put((future, no_rekening, pin))
            verdict: str = await future
        if verdict == RIGHT:
            self._remembered[secret] = no_rekening
        return verdict

    def _work(self) -> None:
        while self._answer(self._jobs.get()):  # in no variable here, which would keep the PIN until the next
            pass

    def _answer(self, job: "tuple[asyncio.Future[str], str, bytes] | None") -> bool:
        """Do a job; False at the end."""
        if job is None or self._stopping:
            return False
        future, no_rekening, pin = job
        try:
            verdict = self._verdict(no_rekening, pin)
        except (DBAPIError, ValueError) as error:  # ValueError: what stands in the table is no bcrypt hash
            log.error("PIN not checked", extra=describe(error) | {"no_rekening": masked(no_rekening)})
            verdict = UNAVAILABLE
        with suppress(RuntimeError):  # the event loop has ended
            future.get_loop().call_soon_threadsafe(_settle, future, verdict)
        return True

    def _verdict(self, no_rekening: str, pin: bytes) -> str:
        """Every cause of a refusal costs one bcrypt; the lock as it is afterwards decides."""
        with self._engine.begin() as connection:
            found = datastore.find_kredensial(connection, no_rekening)
        right = bcrypt.checkpw(pin, found.pin_hash.encode() if found else DUMMY_HASH)
        if not found:
            return "unknown account"
        if found.terkunci:
            return "locked"
        with self._engine.begin() as connection:
            if right:
                return RIGHT if datastore.pin_right(connection, no_rekening) else "locked"
            if datastore.pin_wrong(connection, no_rekening, self._max_failures, self._locked_for):
                log.warning("account locked", extra={"no_rekening": masked(no_rekening)})
        return "wrong PIN"


def _settle(future: "asyncio.Future[str]", verdict: str) -> None:
    if not future.done():
        future.set_result(verdict)
