"""The PIN check: account number and PIN of the Authorization header.

A right PIN is remembered for a while, so that the next request costs microseconds. Any other costs one
bcrypt, in threads of low priority. Each attempt is counted in the database before it is made: however many
guess at once, no more than the limit are compared.
"""

import asyncio
import base64
import hashlib
import logging
import re
import secrets
from functools import partial

import bcrypt
from cachetools import TTLCache
from sqlalchemy import Engine

from common.connections import Database
from common.telemetry import masked
from transaksi import datastore
from transaksi.app import Refusal

log = logging.getLogger(__name__)

MAX_CHECKS = 64  # under way in a process; the surplus is turned away
MAX_REMEMBERED = 100_000
CREDENTIALS = re.compile(rb"([0-9]{10,16}):([0-9]{6})")
DUMMY_HASH = bcrypt.hashpw(secrets.token_bytes(16), bcrypt.gensalt(10)).decode()


def parse(authorizations: list[str]) -> tuple[str, bytes]:
    """Account number and PIN of the one Authorization header (RFC 7617). Raises `Refusal`."""
    scheme, _, token = "".join(authorizations[:1]).partition(" ")
    try:
        match = CREDENTIALS.fullmatch(base64.b64decode(token.strip(), validate=True))
    except ValueError:
        match = None
    if len(authorizations) != 1 or scheme.lower() != "basic" or not match:
        raise Refusal("not_authenticated", "missing or malformed")
    return match[1].decode(), match[2]


class PinCheck:
    """The checks of one process.

    A right PIN is remembered for `ttl_s` seconds (0: not at all). `max_failures` attempts since the last
    right PIN lock the account for `lock_minutes`.
    """

    def __init__(self, database: Database, ttl_s: int, max_failures: int, lock_minutes: int) -> None:
        self._database = database
        self._max_failures, self._lock_minutes = max_failures, lock_minutes
        self._key = secrets.token_bytes(32)
        self._remembered: TTLCache[bytes, bool] = TTLCache(MAX_REMEMBERED, ttl_s)
        self._running: dict[bytes, asyncio.Future[None]] = {}

    async def check(self, account: str, pin: bytes) -> None:
        """Return if the PIN is the account's. Raises `Refusal`, or `DBAPIError` if the database is away."""
        # Keyed, so that no PIN is kept in memory; the colon keeps the two parts apart.
        secret = hashlib.blake2b(b"%s:%s" % (account.encode(), pin), key=self._key).digest()
        if secret in self._remembered:
            return
        if secret not in self._running:
            if len(self._running) >= MAX_CHECKS:
                raise Refusal("unavailable", "too many PIN checks")
            check = self._running[secret] = self._database.run(self._compare, account, pin)
            check.add_done_callback(partial(self._end, secret))
        await asyncio.shield(self._running[secret])  # equal checks share one

    def _end(self, secret: bytes, check: asyncio.Future[None]) -> None:
        del self._running[secret]
        if not check.exception():
            self._remembered[secret] = True

    def _compare(self, engine: Engine, account: str, pin: bytes) -> None:
        """Raises `Refusal` unless the PIN is right. Costs one bcrypt in every case."""
        attempt = datastore.count_attempt(engine, account, self._max_failures, self._lock_minutes)
        right = bcrypt.checkpw(pin, (attempt.pin_hash if attempt else DUMMY_HASH).encode())
        if not attempt:
            raise Refusal("not_authenticated", "unknown account or locked")
        if not right:
            if attempt.pin_gagal >= self._max_failures:
                log.warning("account locked", extra={"no_rekening": masked(account)})
            raise Refusal("not_authenticated", "wrong PIN")
        datastore.forget_attempts(engine, account, attempt.pin_gagal)
