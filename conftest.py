"""Fixtures: services on servers of our own, or with API_URL a deployment (needs only httpx)."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partialmethod
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

if not (API_URL := os.environ.get("API_URL")):
    import psycopg2
    from redis import Redis as RedisClient

    from dev.local import Postgres, Redis, Service

PIN = "123456"
PIN_HASH = "$2b$10$CxlNcIK8q19til.lbenvnuJlfS/0p3G3DAT5tMDHzVeYB1zUfq8aW"  # of PIN, as in init.sql
LOG_LINE = (
    r'\{"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z","level":"[A-Z]+",'
    r'"message":".+","logger":".+","service":"(transaksi|mutasi)".*\}'
)
SECRETS = {
    "a PIN": r"(?<!\w)(123456|234567|345678)(?!\w)",  # those of this file and of init.sql
    "a PIN in base64": "MjM0NTY=|MzQ1Njc=|NDU2Nzg=",  # the ends of their Authorization headers
    "a header": "(?i)basic [a-z0-9+/]{8}",
    "a hash": r"\$2[aby]\$",
    "an account number": r"(?<![\w-])\d{10,16}(?![\w-])",
}
_numbers = count(5_000_000_000)


def eventually(check: Callable[[], Any], seconds: float = 20, every: float = 0.02) -> Any:
    """Return the result of `check` as soon as it is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {check}"
        time.sleep(every)
    return value


class Customer:
    """An HTTP client that authenticates with an account number and a PIN."""

    def __init__(self, url: str, no_rekening: str, pin: str = PIN) -> None:
        self.no_rekening = no_rekening
        self.client = httpx.Client(base_url=url, auth=(no_rekening, pin), timeout=30)
        self.close = self.client.close

    def post(self, path: str, nominal: Any, no_rekening: str = "", **headers: str) -> httpx.Response:
        """Headers are keywords: `idempotency_key="x"` is sent as Idempotency-Key."""
        payload = {"no_rekening": no_rekening or self.no_rekening, "nominal": nominal}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(path, json=payload, headers=names)

    deposit, withdraw = partialmethod(post, "/tabung"), partialmethod(post, "/tarik")

    def balance(self) -> int:
        return int(self.client.get("/saldo").raise_for_status().json()["saldo"])


class Database:
    """PostgreSQL as its superuser sees it."""

    def __init__(self, server: Postgres) -> None:
        self.server = server

    def __call__(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement in a transaction of its own; return its rows."""
        with self.holding(query, *parameters) as rows:
            return rows

    @contextmanager
    def holding(self, query: str, *parameters: Any) -> Iterator[list[tuple[Any, ...]]]:
        """Run a statement and keep its transaction, with its locks, open during the block."""
        with closing(psycopg2.connect(self.server.url())) as db, db, db.cursor() as cursor:
            cursor.execute(query, parameters)
            yield cursor.fetchall() if cursor.description else []

    def open_account(self, saldo: int = 0) -> str:
        """Open an account with PIN 123456; return its number."""
        no_rekening = str(next(_numbers))
        self("SELECT buka_rekening(%s, 'Uji Coba', %s, %s)", no_rekening, PIN_HASH, saldo)
        return no_rekening

    def saldo(self, no_rekening: str) -> int:
        return int(self("SELECT saldo FROM rekening WHERE no_rekening = %s", no_rekening)[0][0])

    def audit(self, seconds: float = 30) -> None:
        """Every movement is booked or in the outbox, never both, and soon all are booked."""
        booked, waiting = (f"id IN (SELECT id_transaksi FROM {t})" for t in ("mutasi", "outbox"))
        assert self(f"SELECT id FROM transaksi WHERE ({booked}) = ({waiting})") == []
        eventually(lambda: self("SELECT count(*) FROM outbox") == [(0,)], seconds)
        differ = "SELECT * FROM audit_saldo WHERE (selisih_transaksi, selisih_mutasi) <> (0, 0)"
        eventually(lambda: self(differ) == [], seconds)


class Servers:
    """The PostgreSQL and Redis of the tests, and the services started on them."""

    def __init__(self, directory: Path, postgres: Postgres, redis: Redis) -> None:
        self.directory, self.postgres, self.redis = directory, postgres, redis
        self.database = Database(postgres)
        self.stream = RedisClient(port=redis.port, password=redis.password)

    def service(self, name: str, *arguments: str, **options: Any) -> Service:
        return Service(name, self.postgres, self.redis, *arguments, directory=self.directory, **options)


def log_lines(service: Service, message: str = "(?s).*") -> list[dict[str, Any]]:
    """The log entries since the last start of a service whose message matches."""
    whole = re.findall(rb"^\{.*\}\n", service.log.read_bytes()[service.log_start :], re.MULTILINE)
    return [entry for entry in map(json.loads, whole) if re.fullmatch(message, entry["message"])]


@contextmanager
def new_servers() -> Iterator[Servers]:
    """Empty servers; at the end, each line that services have logged on them is checked."""
    if API_URL:
        pytest.skip("needs SQL and the stream: API_URL is set")
    with TemporaryDirectory(prefix="tabungan-test-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # run by root, PostgreSQL is another user
        with Postgres(directory / "postgres") as postgres, Redis(directory / "redis") as redis:
            yield Servers(directory, postgres, redis)
            secrets = SECRETS | {"a password": "|".join([redis.password, *postgres.passwords.values()])}
            for line in "".join(log.read_text() for log in directory.glob("*.log")).splitlines():
                assert re.fullmatch(LOG_LINE, line), line
                # Not the ids of traces, which are random and may look like an account number.
                values = [value for name, value in json.loads(line).items() if not name.endswith("_id")]
                told = "\n".join(str(value) for value in values if not isinstance(value, int))
                assert not [kind for kind, form in secrets.items() if re.search(form, told)], line


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with new_servers() as started:
        yield started


@pytest.fixture(scope="session")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the API answers: two workers on the session's servers, or API_URL."""
    if API_URL:
        yield API_URL
    else:
        servers: Servers = request.getfixturevalue("servers")
        options = ("--workers", "2", "--max-pin-failures", "1000000", "--resend-after", "1")
        with servers.service("mutasi"), servers.service("transaksi", *options) as transaksi:
            yield transaksi.url


@pytest.fixture
def database(servers: Servers, url: str) -> Database:  # noqa: ARG001 - starts the services
    """SQL on the database behind `url`; skipped with API_URL."""
    return servers.database


@pytest.fixture
def customer() -> Iterator[Callable[..., Customer]]:
    """Makes customers, `customer(url, no_rekening, pin)`, and closes their connections."""
    with ExitStack() as stack:
        yield lambda *parts: stack.enter_context(closing(Customer(*parts)))


@pytest.fixture
def budi(url: str, customer: Callable[..., Customer]) -> Customer:
    """The customer of the README: account 1234567890, PIN 123456."""
    return customer(url, "1234567890")
