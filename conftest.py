"""Fixtures: a bank of real processes on real servers, or with API_URL one that is already running."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psycopg2
import pytest
from redis import Redis as RedisClient

from dev.local import Postgres, Redis, Service

API_URL = os.environ.get("API_URL")
PIN = "123456"
PIN_HASH = "$2b$10$CxlNcIK8q19til.lbenvnuJlfS/0p3G3DAT5tMDHzVeYB1zUfq8aW"  # of PIN, as in init.sql
_numbers = count(5_000_000_000)


def eventually(check: Callable[[], Any], seconds: float = 20, every: float = 0.02) -> Any:
    """What `check` gives as soon as it is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {check}"
        time.sleep(every)
    return value


@dataclass
class Nasabah:
    """A customer at the counter."""

    url: str
    no_rekening: str
    pin: str = PIN
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, auth=(self.no_rekening, self.pin), timeout=30)

    def tabung(self, nominal: Any, **headers: str) -> httpx.Response:
        return self.post("/tabung", nominal, **headers)

    def tarik(self, nominal: Any, **headers: str) -> httpx.Response:
        return self.post("/tarik", nominal, **headers)

    def post(self, path: str, nominal: Any, no_rekening: str | None = None, **headers: str) -> httpx.Response:
        """Headers as keywords: `idempotency_key="x"` is sent as Idempotency-Key."""
        return self.client.post(
            path,
            json={"no_rekening": no_rekening or self.no_rekening, "nominal": nominal},
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )


class Database:
    """PostgreSQL as its superuser sees it."""

    def __init__(self, postgres: Postgres) -> None:
        self.server = postgres

    def __call__(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """The rows of one statement, in a transaction and a connection of its own."""
        connection = psycopg2.connect(self.server.url())
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(query, parameters)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def open_account(self, saldo: int = 0) -> str:
        """A new account with PIN 123456."""
        no_rekening = str(next(_numbers))
        self("SELECT buka_rekening(%s, 'Uji Coba', %s, %s)", no_rekening, PIN_HASH, saldo)
        return no_rekening

    def saldo(self, no_rekening: str) -> int:
        return int(self("SELECT saldo FROM rekening WHERE no_rekening = %s", no_rekening)[0][0])

    def differences(self) -> list[tuple[Any, ...]]:
        """The accounts for which balance, journal and mutation book do not agree."""
        return self("SELECT * FROM audit_saldo WHERE (selisih_transaksi, selisih_mutasi, beda) <> (0, 0, 0)")

    def audit(self, seconds: float = 30) -> None:
        """Outbox and stream empty themselves, and then everything agrees to the rupiah."""
        eventually(lambda: self("SELECT count(*) FROM outbox") == [(0,)], seconds)
        eventually(lambda: not self.differences(), seconds)


@dataclass
class Servers:
    """PostgreSQL and Redis of the test run, and what starts services on them."""

    directory: Path
    postgres: Postgres
    redis: Redis

    @property
    def database(self) -> Database:
        return Database(self.postgres)

    @property
    def stream(self) -> RedisClient:
        return RedisClient(port=self.redis.port, password=self.redis.password)

    def service(self, name: str, *arguments: str, **options: Any) -> Service:
        return Service(name, self.postgres, self.redis, *arguments, directory=self.directory, **options)


def log_lines(service: Service, message: str = "(?s).*") -> list[dict[str, Any]]:
    """What a service has logged since its last start, where the message matches."""
    with service.log.open("rb") as log:
        log.seek(service.log_start)
        entries = [json.loads(line) for line in log if line.startswith(b"{") and line.endswith(b"}\n")]
    return [entry for entry in entries if re.fullmatch(message, entry["message"])]


FIELDS = {
    "timestamp": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
    "level": "DEBUG|INFO|WARNING|ERROR|CRITICAL",
    "message": "(?s).+",
    "service": "transaksi|mutasi",
    "logger": ".+",
}
SECRETS = {
    "a PIN": r"(?<!\w)(123456|234567|345678)(?!\w)",  # of the accounts of conftest.py and init.sql
    "a PIN in base64": "MjM0NTY=|MzQ1Njc=|NDU2Nzg=",  # how the credentials of these accounts end
    "a header": "(?i)basic [a-z0-9+/]{8}",
    "a hash": r"\$2[aby]\$",
    "an account number": r"(?<![\w-])\d{10,16}(?![\w-])",
}


def flaw_of(line: str) -> str | None:
    """What is wrong with a line of a service's log: not JSON, not with its fields, or with a secret in it."""
    try:
        entry = json.loads(line)
    except ValueError:
        return "no JSON"
    for name, form in FIELDS.items():
        if not re.fullmatch(form, str(entry.get(name, ""))):
            return f"no {name}"
    # The ids of a trace are random: they may well look like an account number.
    texts = [text for name, text in entry.items() if isinstance(text, str) and not name.endswith("_id")]
    return next((kind for kind, form in SECRETS.items() if re.search(form, "\n".join(texts))), None)


@contextmanager
def new_servers() -> Iterator[Servers]:
    """Empty servers of one's own; at the end each line that services have logged there is looked at."""
    if API_URL:
        pytest.skip("needs SQL and the stream: API_URL is set")
    with TemporaryDirectory(prefix="tabungan-test-") as made:
        directory = Path(made)
        directory.chmod(0o711)  # run by root, PostgreSQL is another user
        with Postgres(directory / "postgres") as postgres, Redis(directory / "redis") as redis:
            yield Servers(directory, postgres, redis)
            for log in (log for name in ("transaksi", "mutasi") for log in directory.glob(f"{name}-*.log")):
                for line in log.read_text().splitlines():
                    assert not (flaw := flaw_of(line)), f"{flaw} in a log line of {log.stem}: {line}"


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with new_servers() as started:
        yield started


@pytest.fixture(scope="session")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the API answers: two workers and mutasi on servers of our own, or API_URL."""
    if API_URL:
        yield API_URL
        return
    servers: Servers = request.getfixturevalue("servers")
    transaksi = servers.service("transaksi", "--workers", "2", "--max-pin-failures", "1000000")
    with servers.service("mutasi"), transaksi:
        yield transaksi.url


@pytest.fixture
def database(servers: Servers, url: str) -> Database:  # noqa: ARG001 - its services must run
    """SQL on the database behind `url`; skipped by name where that is somebody else's."""
    return servers.database


@pytest.fixture
def nasabah() -> Iterator[Callable[..., Nasabah]]:
    """Makes customers: `nasabah(url, no_rekening, pin)`; their connections are closed afterwards."""
    with ExitStack() as stack:

        def at_the_counter(url: str, no_rekening: str, pin: str = PIN) -> Nasabah:
            customer = Nasabah(url, no_rekening, pin)
            stack.callback(customer.client.close)
            return customer

        yield at_the_counter


@pytest.fixture
def budi(url: str, nasabah: Callable[..., Nasabah]) -> Nasabah:
    """The customer of the README: 1234567890, PIN 123456."""
    return nasabah(url, "1234567890")
