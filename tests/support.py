"""What the tests share: customers, the database as its superuser sees it, servers and log lines."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partialmethod
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from unittest.mock import patch

import httpx
import psycopg2
from redis import Redis as RedisClient

from dev.local import PIN, PIN_HASH, ROOT, Postgres, Redis, Service

LOG_LINE = (
    r'\{"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z","level":"[A-Z]+",'
    r'"message":".+","service":"(transaksi|mutasi)".*\}'
)
SECRETS = {
    "a PIN": r"(?<!\w)(123456|234567|345678)(?!\w)",  # those of this file and of init.sql
    "a PIN in base64": "MjM0NTY=|MzQ1Njc=|NDU2Nzg=",  # the ends of their Authorization headers
    "a header": "(?i)basic [a-z0-9+/]{8}",
    "a hash": r"\$2[aby]\$",
    "an account number": r"(?<![\w-])\d{10,16}(?![\w-])",
}
# No proxy of the environment, and no certificates, which take longest to load.
DIRECT: dict[str, Any] = {"timeout": 60, "trust_env": False, "verify": False}
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
        auth = (no_rekening, pin)
        self.client = httpx.Client(base_url=url, auth=auth, **DIRECT)
        self.close = self.client.close

    def post(
        self, path: str, nominal: Any, no_rekening: str = "", **headers: str
    ) -> httpx.Response:
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
        return Service(
            name, self.postgres, self.redis, *arguments, directory=self.directory, **options
        )

    def patched(self, code: str, *arguments: str) -> Service:
        """Return a service transaksi that runs this code before it starts."""
        directory = Path(mkdtemp(dir=self.directory))
        (directory / "sitecustomize.py").write_text(code)
        path = {"PYTHONPATH": f"{directory}:{ROOT}"}
        return self.service("transaksi", *arguments, environment=path)


def start(*services: Service) -> None:
    """Start services at once: most of the time goes into imports, which use one core each."""
    with patch.object(Service, "_ready", return_value=True):
        for service in services:
            service.start()
    for service in services:
        eventually(service._ready, 60)


@contextmanager
def running(*services: Service) -> Iterator[None]:
    try:
        start(*services)
        yield
    finally:
        for service in services:
            service.stop()


def log_lines(service: Service, message: str = "(?s).*") -> list[dict[str, Any]]:
    """The log entries since the last start of a service whose message matches."""
    whole = re.findall(rb"^\{.*\}\n", service.log.read_bytes()[service.log_start :], re.MULTILINE)
    return [entry for entry in map(json.loads, whole) if re.fullmatch(message, entry["message"])]


def log_line(service: Service, message: str = ".*", **context: Any) -> dict[str, Any]:
    """Return the only log line with this message and context, without its timestamp."""

    def lines() -> list[dict[str, Any]]:
        return [one for one in log_lines(service, message) if one.items() >= context.items()]

    (found,) = eventually(lines)
    return {name: value for name, value in found.items() if name != "timestamp"}


@contextmanager
def new_servers() -> Iterator[Servers]:
    """Start empty servers. At the end, each line that services have logged is checked."""
    with TemporaryDirectory(prefix="tabungan-test-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # run by root, PostgreSQL is another user
        with Postgres(directory / "postgres") as postgres, Redis(directory / "redis") as redis:
            yield Servers(directory, postgres, redis)
            passwords = [redis.password, *postgres.passwords.values()]
            check_logs(directory, SECRETS | {"a password": "|".join(passwords)})


def check_logs(directory: Path, secrets: dict[str, str]) -> None:
    """Each line on stdout is one JSON object without a secret; stderr has nothing but FATALs.

    libpq itself writes a FATAL to stderr if it comes while a connection is being opened.
    """
    for line in "".join(log.read_text() for log in directory.glob("*.log")).splitlines():
        assert re.fullmatch(LOG_LINE, line), line
        # Not the ids of traces, which are random and may look like an account number.
        fields = {k: v for k, v in json.loads(line).items() if not k.endswith("_id")}
        text = "\n".join(str(value) for value in fields.values() if not isinstance(value, int))
        assert not [kind for kind, form in secrets.items() if re.search(form, text)], line
    for line in "".join(log.read_text() for log in directory.glob("*.stderr")).splitlines():
        assert re.fullmatch("FATAL: .*", line), line
