"""Load whose answers are checked, and a bank that a test may break."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from random import choice, randint
from threading import Event
from typing import Any
from uuid import uuid4

import httpx
import psutil

from common.stream import STREAM
from dev.local import PIN, Postgres, Server, Service
from tests.support import DIRECT, Servers, eventually, start

PATIENT = ("--request-timeout", "40", "--resend-after", "1")
CALM = ("--request-timeout", "40", "--resend-after", "3600")  # resends nothing
# A movement of 666 rupiah fails before its commit, one of 667 after it. While the file exists,
# connecting fails as it does when PostgreSQL refuses it in Latin-1.
FAULTS = """
import os, psycopg2
from transaksi import datastore
from transaksi.app import Teller
from transaksi.stream import Stream

def refuse(*args, connect=psycopg2.connect, **kwargs):
    if os.path.exists({!r}):
        b"d\\xe9mon".decode()
    return connect(*args, **kwargs)

def record(db, rows, record=datastore.record):
    journal = record(db, rows)
    1 / (rows[0]["nominal"] - 666)
    return journal

def hand_over(stream, journal, hand_over=Stream.hand_over):
    [1 / (row["nominal"] - 667) for row in journal]
    hand_over(stream, journal)

psycopg2.connect, datastore.record, Stream.hand_over = refuse, record, hand_over
Teller.MAX_WAITING = 5
"""
GATHERS_LONG = "from transaksi.stream import Stream; Stream.GATHER_S = 60"
GAPS = """SELECT id FROM (
    SELECT id, saldo_akhir, sum(CASE jenis_transaksi WHEN 'tabung' THEN nominal ELSE -nominal END)
    OVER (PARTITION BY no_rekening ORDER BY id) AS saldo FROM transaksi
) _ WHERE saldo <> saldo_akhir"""


@dataclass(eq=False)
class Request:
    """A movement that is requested once, and the answer."""

    no_rekening: str
    jenis: str = "tabung"
    nominal: int = 1
    key: str = field(default_factory=lambda: uuid4().hex)
    status: int | None = None  # None: no answer
    saldo: int | None = None
    replayed: bool = False
    unknown: bool = True  # the client cannot tell whether money was moved

    def send(self, client: httpx.Client) -> bool:
        """Send it. Returns False if nobody listens."""
        payload = {"no_rekening": self.no_rekening, "nominal": self.nominal}
        headers = {"Idempotency-Key": self.key}
        auth = (self.no_rekening, PIN)
        try:
            answer = client.post(f"/{self.jenis}", json=payload, auth=auth, headers=headers)
        except httpx.ConnectError:
            return False
        except httpx.TransportError:  # no answer, or a part of one
            return True
        self.status = answer.status_code
        self.saldo = answer.json().get("saldo")
        self.replayed = "Idempotent-Replayed" in answer.headers
        self.unknown = self.status == 503 and "Retry-After" not in answer.headers
        return True


class Load(AbstractContextManager["Load"]):
    """Sends requests over connections spread over the urls until `with` ends, one each at least."""

    def __init__(self, requests: Iterable[Request], urls: list[str], connections: int) -> None:
        self.sent: list[Request] = []  # in the order of their answers
        self._requests = iter(requests)  # which the threads share, so it is no generator
        self._stopping = Event()
        self._pool = ThreadPoolExecutor(connections)
        self._work = self._pool.map(self._keep_busy, (urls * connections)[:connections])

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        list(self._work)  # raises what a thread has raised
        self._pool.shutdown()

    def statuses(self) -> Counter[int | None]:
        return Counter(request.status for request in list(self.sent))

    def wait(self, more: int = 100, status: int = 200) -> None:
        """Return when so many more requests were answered with this status."""
        wanted = self.statuses()[status] + more
        eventually(lambda: self.statuses()[status] >= wanted, 60)

    def _keep_busy(self, url: str) -> None:
        with httpx.Client(base_url=url, **DIRECT) as client:
            for request in self._requests:
                while not (sent := request.send(client)) and not self._stopping.wait(0.05):
                    pass
                if sent:
                    self.sent.append(request)
                if self._stopping.is_set():
                    break


class Bank:
    """Both services on servers of their own, and the load of the running test."""

    def __init__(self, servers: Servers) -> None:
        self.service, self.sql, self.redis = servers.service, servers.database, servers.redis
        self.stream: Any = servers.stream  # untyped, as its answers are
        self.directory = servers.directory
        for role in ("transaksi", "mutasi"):  # longer than any lock that a test holds
            self.sql(f"ALTER ROLE {role} SET lock_timeout = '40s'")
            self.sql(f"ALTER ROLE {role} SET statement_timeout = '40s'")
        self.transaksi = self.service("transaksi", *PATIENT)
        self.mutasi = self.service("mutasi")
        self.calm = self.service("transaksi", *CALM)
        self.quick = self.service("transaksi", *CALM, "--request-timeout", "1")
        self.refused = self.directory / "refused"
        self.faulty = servers.patched(FAULTS.format(str(self.refused)), *CALM)
        self.slow = servers.patched(GATHERS_LONG, *CALM)
        transaksi = [self.transaksi, self.calm, self.quick, self.faulty, self.slow]
        self.services = [self.mutasi, *transaksi]
        self.accounts = [self.sql.open_account(1_000_000_000) for _ in range(4)]
        self.loads: list[Load] = []

    def repair(self) -> None:
        """Start what does not run."""
        for server in (self.sql.server, self.redis):
            if not server.running:
                server.start()
        start(*[service for service in (self.mutasi, self.transaksi) if not service.running])

    def started(self, service: Service) -> Service:
        """Return one that only some tests need, and that runs."""
        if not service.running:
            service.start()
        return service

    def deposits(self, count: int, **values: Any) -> list[Request]:
        """Return deposits to the first account."""
        return [Request(self.accounts[0], **values) for _ in range(count)]

    def any_movement(self) -> Request:
        hot = self.accounts[0]
        account = choice((hot, choice(self.accounts)))
        return Request(account, choice(("tabung", "tarik")), randint(1, 1000))

    def load(
        self, *services: Service, requests: Sequence[Request] = (), connections: int = 16
    ) -> Load:
        """Send these at once, each over a connection of its own; without any, endless ones."""
        urls = [service.url for service in services or [self.transaksi]]
        self.loads.append(
            Load(requests or iter(self.any_movement, None), urls, len(requests) or connections)
        )
        return self.loads[-1]

    def send(self, requests: Sequence[Request], *services: Service) -> set[int | None]:
        """Send these at once. Returns the statuses of the answers."""
        with self.load(*services, requests=requests) as load:
            pass
        return set(load.statuses())

    @contextmanager
    def queued(self, requests: Sequence[Request], service: Service | None = None) -> Iterator[Load]:
        """Send these while the first account is locked. The block begins when they wait."""
        service = service or self.transaksi
        for account in {request.no_rekening for request in requests}:
            get(service, "/saldo", account)  # caches the PIN
        lock = "SELECT FROM rekening WHERE no_rekening = %s FOR UPDATE"
        with self.sql.holding(lock, self.accounts[0]):
            load = self.load(service, requests=requests)
            waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            eventually(lambda: self.sql(waiting))
            for _ in range(20):  # rounds of its event loop
                get(service, "/openapi.json")
            yield load
        with load:
            pass

    def journal(self) -> dict[str, tuple[Any, ...]]:
        columns = "idempotency_key, no_rekening, jenis_transaksi, nominal, saldo_akhir"
        return {key: tuple(row) for key, *row in self.sql(f"SELECT {columns} FROM transaksi")}

    def check(self) -> None:
        """All answers are true, those of unknown outcome can be repeated, and the books agree."""
        self.repair()
        # The transaction of a killed client may still be ending.
        eventually(lambda: not self.sql("SELECT 1 FROM pg_stat_activity WHERE state ~ '^idle in'"))
        sent = [request for load in self.loads for request in load.sent]
        again = [Request(r.no_rekening, r.jenis, r.nominal, r.key) for r in sent if r.unknown]
        assert not again or self.send(again) == {200}
        journal = self.journal()
        for r in (*sent, *again):
            told = (r.no_rekening, r.jenis, r.nominal, r.saldo) if r.status == 200 else None
            assert r.unknown or journal.get(r.key) == told, r
        self.sql.audit()
        eventually(lambda: self.stream.xlen(STREAM) == 0)
        assert self.sql(GAPS) == []


def get(service: Service, path: str, account: str = "") -> httpx.Response:
    return httpx.get(service.url + path, auth=(account, PIN), **DIRECT)


@contextmanager
def hung(server: Server) -> Iterator[None]:
    """Suspend all processes of a server: its sockets stay open, but nothing answers."""
    parent = psutil.Process(server.pid)
    parent.suspend()  # first, so that it starts no more children
    processes = [*parent.children(), parent]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@contextmanager
def configured(server: Postgres, setting: str, value: str) -> Iterator[None]:
    """Change a setting of a PostgreSQL server during the block."""
    reload = ("-c", "SELECT pg_reload_conf()")
    server.psql("-c", f"ALTER SYSTEM SET {setting} = '{value}'", *reload)
    try:
        yield
    finally:
        server.psql("-c", f"ALTER SYSTEM RESET {setting}", *reload)
