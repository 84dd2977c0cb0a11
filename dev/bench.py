"""The benchmark: `python -m dev.bench` measures everything in one run, on servers of its own.

The candidates take turns, several rounds over; figures are medians of the rounds, ratios are taken within a round.
After every load outbox and stream must become empty and the audit be zero, otherwise the failure stands in the
figure's place and the exit status is 1. No process is pinned: load, services and servers share the machine.
"""

# A command-line tool that starts programs of ours; the benchmark's random numbers are no secrets.
# ruff: noqa: S311, S603, T201

import argparse
import json
import os
import platform
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import bcrypt
import psycopg2
import redis
import sqlalchemy
from fastapi import FastAPI

from dev.local import HOST, ROOT, Postgres, Redis, Server, Service, data_directory, inherited_environment
from settings import STREAM
from transaksi.api import Permintaan, Saldo
from transaksi.app import MAX_NOMINAL
from transaksi.datastore import Rekening, Transaksi

REDIS_SETTINGS = ("appendonly", "appendfsync")
FIRST = 6_000_000_000
BACKLOG = 100_000
PIN = "123456"
PIN_HASH = "$2b$10$CxlNcIK8q19til.lbenvnuJlfS/0p3G3DAT5tMDHzVeYB1zUfq8aW"  # of PIN, as in init.sql
PLAIN_DB = "polos"  # the references' own copy: their movements have no mutations
AUDIT = "SELECT count(*) FROM audit_saldo WHERE (selisih_transaksi, selisih_mutasi, beda) <> (0, 0, 0)"
PLAIN_AUDIT = "SELECT count(*) FROM audit_saldo WHERE selisih_transaksi <> 0"
PGBENCH = """\\set no random({first}, {last})
WITH r AS (UPDATE rekening SET saldo = saldo + 1 WHERE no_rekening = (:no)::text RETURNING no_rekening, saldo),
    t AS (INSERT INTO transaksi (no_rekening, jenis_transaksi, nominal, saldo_akhir)
        SELECT no_rekening, 'tabung', 1, saldo FROM r RETURNING id)
INSERT INTO outbox (id_transaksi) SELECT id FROM t;
"""
FILL = """
WITH r AS (UPDATE rekening SET saldo = saldo + %(each)s WHERE no_rekening = ANY(%(accounts)s)
        RETURNING no_rekening, saldo - %(each)s AS dulu),
    t AS (INSERT INTO transaksi (no_rekening, jenis_transaksi, nominal, saldo_akhir)
        SELECT no_rekening, 'tabung', 1, dulu + n FROM generate_series(1, %(each)s) n, r RETURNING id)
INSERT INTO outbox (id_transaksi) SELECT id FROM t
"""


class Failed(Exception):
    """Why a load's figure does not count."""


# ---------------------------------------------------------------- the references


def noop() -> FastAPI:
    """The ceiling: the same payload and answer models, and nothing done."""
    app = FastAPI()

    @app.post("/tabung")
    async def tabung(permintaan: Permintaan) -> Saldo:
        return Saldo(saldo=permintaan.nominal)

    return app


def plain() -> FastAPI:
    """The plain way: one transaction of three statements per request, no authentication, no outbox."""
    url = sqlalchemy.make_url(os.environ["DB_URL"]).set(drivername="postgresql+psycopg2")
    engine = sqlalchemy.create_engine(url, pool_size=40)  # a connection for each of Starlette's threads
    app = FastAPI()

    @app.post("/tabung")
    def tabung(permintaan: Permintaan) -> Saldo:
        no_rekening, nominal = permintaan.no_rekening, permintaan.nominal
        mine = Rekening.no_rekening == no_rekening
        with engine.begin() as connection:
            saldo = connection.scalars(sqlalchemy.select(Rekening.saldo).where(mine).with_for_update()).one()
            saldo += nominal
            connection.execute(sqlalchemy.update(Rekening).where(mine).values(saldo=saldo))
            row = {"no_rekening": no_rekening, "jenis_transaksi": "tabung", "nominal": nominal}
            connection.execute(sqlalchemy.insert(Transaksi).values(row | {"saldo_akhir": saldo}))
        return Saldo(saldo=saldo)

    return app


class Reference(Server):
    """One of the two above, with transaksi's own server settings."""

    def __init__(self, name: str, directory: Path, **environment: str) -> None:
        super().__init__(name, directory, f"{name}.log", None)
        self._cwd = ROOT
        self._environment = environment

    def _command(self) -> Sequence[str | Path]:
        options = ("--factory", "--no-access-log", "--no-server-header", "--log-level", "warning")
        address = ("--host", HOST, "--port", str(self.port))
        return [sys.executable, "-m", "uvicorn", f"dev.bench:{self.name}", *options, *address]

    def _ready(self) -> bool:
        with socket.socket() as line:
            return line.connect_ex((HOST, self.port)) == 0


# ---------------------------------------------------------------- the load generator, a process of its own


def post(path: str, no_rekening: str, nominal: int, pin: str = PIN) -> bytes:
    """A whole request, as it goes over the wire."""
    body = json.dumps({"no_rekening": no_rekening, "nominal": nominal})
    proof = b64encode(f"{no_rekening}:{pin}".encode()).decode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Basic {proof}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


@dataclass
class Shots:
    """What came back."""

    seconds: float
    cpu: float
    statuses: Counter[int]
    latencies: list[float]
    answered: list[tuple[int, float, bytes]]  # of a paced load: which request, when, what

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds


def fire(
    port: int,
    requests: Sequence[bytes],
    connections: int,
    seconds: float,
    rate: float = 0,
    limit: int | None = None,
) -> Shots:
    """Keep `connections` busy for `seconds` or `limit` requests, cycling over those given, at most `rate` a second."""
    poll = select.epoll()
    lines: dict[int, socket.socket] = {}
    for _ in range(connections):
        line = socket.create_connection((HOST, port))
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines[line.fileno()] = line
        poll.register(line, select.EPOLLIN)
    todo = islice(cycle(enumerate(requests)), limit)
    shots = Shots(0, 0, Counter(), [], [])
    free, sent, parts = list(lines), dict[int, tuple[int, float]](), defaultdict[int, bytes](bytes)
    cpu, began = time.process_time(), time.monotonic()
    now = due = began
    while True:
        while free and due <= now < began + seconds and (following := next(todo, None)):
            number, request = following
            fd = free.pop()
            sent[fd] = number, time.monotonic()
            lines[fd].send(request)
            due += 1 / rate if rate else 0
        if not sent and (now >= began + seconds or not rate):
            break
        for fd, _ in poll.poll(max(0.0, due - now) if rate and free else 30):
            part = lines[fd].recv(65536)
            now = time.monotonic()
            if not part:
                raise Failed("the server hung up")
            whole = parts.pop(fd, b"") + part
            if not whole.endswith(b"}"):  # every answer is one flat JSON object
                parts[fd] = whole
                continue
            number, since = sent.pop(fd)
            free.append(fd)
            shots.latencies.append(now - since)
            shots.statuses[int(whole[9:12])] += 1
            if rate:
                shots.answered.append((number, now, whole))
        now = time.monotonic()
        if now > began + seconds + 30:
            raise Failed("the server does not answer")
    shots.seconds, shots.cpu = now - began, time.process_time() - cpu
    for line in lines.values():
        line.close()
    return shots


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Load:
    """A candidate: what is sent where, and the share of it that must be answered 200."""

    server: Server
    requests: Sequence[bytes]
    connections: int = 64
    accepted: float = 1.0
    flood: Sequence[bytes] = ()


@dataclass(frozen=True)
class Figure:
    """One measured load: a second, seconds, CPU seconds a request, seconds until its last mutation was there."""

    rate: float
    p50: float | None = None
    p99: float | None = None
    cpu: dict[str, float] = field(default_factory=dict)
    behind: float | None = None


def percentiles(values: Iterable[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


def cpu_seconds(server: Server) -> float:
    """CPU time of a process and its children, ended ones too."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
            children[int(fields[1])].append(int(entry.name))

    def tree(pid: int) -> int:
        return ticks[pid] + sum(map(tree, children[pid]))

    return tree(server.pid) / os.sysconf("SC_CLK_TCK")


class Bank:
    """Servers, services and accounts of the run, all ended when the `stack` is left."""

    def __init__(self, stack: ExitStack, accounts: int) -> None:
        self._stack = stack
        self.directory = stack.enter_context(data_directory(None))
        self.directory.chmod(0o711)  # run by root, PostgreSQL is another user
        self.accounts = [str(FIRST + n) for n in range(accounts)]
        self.postgres = Postgres(self.directory / "postgres")
        self.redis = Redis(self.directory / "redis")
        self.transaksi = self.service("transaksi", "--auth-cache-ttl", "3600")
        self.mutasi = self.service("mutasi")
        self.plain_url = self.postgres.url().removesuffix("tabungan") + PLAIN_DB
        self.noop = Reference("noop", self.directory)
        self.plain = Reference("plain", self.directory, DB_URL=self.plain_url)
        self.stream = redis.Redis(port=self.redis.port, password=self.redis.password)
        self.generators = ProcessPoolExecutor(2, get_context("spawn"))
        stack.callback(self.generators.shutdown)

    def service(self, name: str, *arguments: str) -> Service:
        return Service(name, self.postgres, self.redis, *arguments, directory=self.directory)

    def start(self, *servers: Server) -> None:
        for server in servers:
            self._stack.callback(server.stop)
            server.start()

    def open(self) -> None:
        """Start everything and open the accounts; their customers are still unknown to transaksi."""
        self.start(self.postgres, self.redis)
        opened = "SELECT buka_rekening(no, 'Nasabah', %(pin_hash)s, 1000000) FROM unnest(%(accounts)s) no"
        self.sql(opened, pin_hash=PIN_HASH, accounts=self.accounts)
        self.sql(f"CREATE DATABASE {PLAIN_DB} TEMPLATE tabungan")
        self.start(self.mutasi, self.transaksi, self.noop, self.plain)

    def sql(self, query: str, url: str = "", **parameters: Any) -> list[tuple[Any, ...]]:
        connection = psycopg2.connect(url or self.postgres.url())
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(query, parameters)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def fire(self, load: Load, seconds: float, **options: Any) -> "Future[Shots]":
        """Start sending a load."""
        return self.generators.submit(
            fire, load.server.port, load.requests, load.connections, seconds, **options
        )

    def settle(self) -> float:
        """Wait until outbox and stream are empty, and then for quiet; the seconds to the former."""
        began = time.monotonic()
        while self.sql("SELECT count(*) FROM outbox") != [(0,)] or self.stream.xlen(STREAM):
            if time.monotonic() > began + 120:
                raise Failed("outbox or stream does not become empty")
            time.sleep(0.05)
        behind = time.monotonic() - began
        while self._busy() > 0.2:  # PIN checks of a flood
            pass
        return behind

    def _busy(self) -> float:
        before = cpu_seconds(self.transaksi)
        time.sleep(0.2)
        return (cpu_seconds(self.transaksi) - before) / 0.2

    def audit(self) -> None:
        for query, url in ((AUDIT, self.postgres.url()), (PLAIN_AUDIT, self.plain_url)):
            if (differing := self.sql(query, url=url)) != [(0,)]:
                raise Failed(f"audit: {differing[0][0]} accounts differ")

    def cpu(self) -> dict[str, float]:
        servers = (self.transaksi, self.mutasi, self.postgres, self.redis, self.noop, self.plain)
        return {server.name: cpu_seconds(server) for server in servers}


def measure(bank: Bank, load: Load, seconds: float, **options: Any) -> Figure:
    """The figure of a load, once all it moved is in the mutation book and the audit is zero."""
    bank.sql("CHECKPOINT")  # so that none comes by chance; every load pays for its own page images
    before = bank.cpu()
    job = bank.fire(load, seconds, **options)
    if load.flood:
        bank.fire(Load(load.server, load.flood), seconds).result()
    shots = job.result()
    behind = bank.settle()
    spent = {name: now - before[name] for name, now in bank.cpu().items()}
    count = shots.statuses.total()
    if set(shots.statuses) - {200, 400} or abs(shots.statuses[200] / count - load.accepted) > 0.01:
        raise Failed(f"answers {dict(shots.statuses)}")
    bank.audit()
    cpu = {name: cost / count for name, cost in spent.items()}
    cpu |= {"served": cpu[load.server.name], "generator": shots.cpu / count}
    return Figure(count / shots.seconds, *percentiles(shots.latencies), cpu, behind)


def end_to_end(bank: Bank, load: Load, seconds: float, rate: float) -> Figure:
    """From the client's 200 to the mutation row, for every deposit of a paced load.

    The book is read every 3 ms, in transactions of their own, so a row counts when another session can see it.
    A deposit is known by its account and balance; both clocks are the machine's monotonic one.
    """
    last = bank.sql("SELECT max(id) FROM transaksi")[0][0]
    seen: dict[tuple[str, int], float] = {}
    connection = psycopg2.connect(bank.postgres.url())
    connection.autocommit = True
    job = bank.fire(load, seconds, rate=rate)
    with closing(connection), connection.cursor() as cursor:
        ended = None
        while not ended or time.monotonic() < ended + 2:
            cursor.execute(
                "SELECT max(id), array_agg(ARRAY[t.no_rekening, saldo_akhir::text]) FROM mutasi m JOIN transaksi t"
                " ON t.id = m.id_transaksi WHERE m.id_transaksi > %s",
                (last,),
            )
            (newest, rows), now = cursor.fetchone() or (None, None), time.monotonic()
            if newest:
                last = newest
                seen |= {(no_rekening, int(saldo)): now for no_rekening, saldo in rows}
            ended = ended or (now if job.done() else None)
            time.sleep(0.003)
    bank.settle()
    bank.audit()
    answers = [
        (number, at, int(body[body.rindex(b":") + 1 : -1])) for number, at, body in job.result().answered
    ]
    keys = [(bank.accounts[number % len(bank.accounts)], saldo) for number, _, saldo in answers]
    if missing := len(set(keys) - seen.keys()):
        raise Failed(f"{missing} of {len(keys)} mutations were not seen in order")
    late = [seen[key] - at for key, (_, at, _) in zip(keys, answers, strict=True)]
    return Figure(len(keys) / seconds, *percentiles(late))


def drain(bank: Bank) -> Figure:
    """How fast mutasi works off a backlog that stands in the stream."""
    bank.mutasi.stop()
    each = BACKLOG // len(bank.accounts)
    bank.sql(FILL, each=each, accounts=bank.accounts)
    began = time.monotonic()
    while bank.stream.xlen(STREAM) < each * len(bank.accounts):
        if time.monotonic() > began + 120:
            raise Failed("the backlog does not reach the stream")
        time.sleep(0.01)
    bank.mutasi.start()
    began = time.monotonic()
    before = bank.cpu()
    while left := bank.stream.xlen(STREAM):
        if time.monotonic() > began + 120:
            raise Failed(f"{left} entries are still in the stream")
        time.sleep(0.01)
    seconds = time.monotonic() - began
    cpu = {name: (now - before[name]) / BACKLOG for name, now in bank.cpu().items()}
    bank.settle()
    bank.audit()
    return Figure(BACKLOG / seconds, cpu=cpu | {"served": cpu["mutasi"]})


def pgbench(bank: Bank, seconds: float) -> Figure:
    """The same movement as one statement, from PostgreSQL's own load generator."""
    script = bank.directory / "pgbench.sql"
    script.write_text(PGBENCH.format(first=bank.accounts[0], last=bank.accounts[-1]))
    options = ("-n", "-M", "prepared", "-c", "16", "-j", "2", "-T", str(max(1, round(seconds))))
    before = cpu_seconds(bank.postgres)
    output = subprocess.run(
        [bank.postgres.programs / "pgbench", *options, "-f", script, bank.plain_url],
        env=inherited_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    done = re.search(r"actually processed: (\d+)", output)
    tps = re.search(r"tps = ([\d.]+)", output)
    if not (done and tps and "failed transactions: 0 " in output):
        raise Failed(f"pgbench: {output[-200:]}")
    cpu = (cpu_seconds(bank.postgres) - before) / int(done[1])
    bank.audit()
    return Figure(float(tps[1]), cpu={"served": cpu, "PostgreSQL": cpu})


def bcrypts(seconds: float) -> Figure:
    """What all the cores together can hash."""
    counts: list[int] = []

    def hash_on() -> None:
        done, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            done += bcrypt.checkpw(PIN.encode(), PIN_HASH.encode())
        counts.append(done)

    threads = [threading.Thread(target=hash_on) for _ in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Figure(sum(counts) / seconds)


# ---------------------------------------------------------------- the run


@dataclass(frozen=True)
class Promise:
    """A figure of DESIGN.md section 8: of one load, against the best of others in the same round."""

    name: str
    load: str
    against: tuple[str, ...]
    must: float
    goal: float | None = None
    get: Callable[[Figure], float] = attrgetter("rate")
    at_most: bool = False

    def verdict(self, got: float) -> str:
        def holds(limit: float | None) -> bool:
            return limit is not None and (got <= limit if self.at_most else got >= limit)

        return "goal" if holds(self.goal) else "reached" if holds(self.must) else "SHORT"


PROMISES = (
    Promise("tabung / no-op", "tabung, 64", ("no-op, 64",), 0.45, 0.7),
    Promise("the same by CPU", "no-op, 64", ("tabung, 64",), 0.45, 0.7, lambda f: f.cpu["served"]),
    Promise("hot account / 1,000 accounts", "hot account, 64", ("tabung, 64",), 0.9, 1.0),
    Promise("tabung / plain", "tabung, 64", ("plain, 64",), 2.5, 4),
    Promise(
        "p50 at 1 connection, tabung / plain",
        "tabung, 1",
        ("plain, 1",),
        1.3,
        None,
        attrgetter("p50"),
        at_most=True,
    ),
    Promise("beside a flood / without", "beside a flood, 64", ("tabung, 64",), 0.5),
    Promise("drain / produce", "drain", ("tabung, 64", "tabung, 256"), 3, 10),
    Promise("end to end, p99 in s", "end to end", (), 0.1, 0.025, attrgetter("p99"), at_most=True),
)


class Run:
    """The candidates, and what was measured of them."""

    def __init__(self, bank: Bank, seconds: float) -> None:
        self.bank = bank
        self.figures: dict[str, list[Figure]] = defaultdict(list)
        self.failed: dict[str, str] = {}
        tabung = [post("/tabung", no_rekening, 1000) for no_rekening in bank.accounts]
        tarik = [post("/tarik", no_rekening, 1000) for no_rekening in bank.accounts]
        refused = [post("/tarik", no_rekening, MAX_NOMINAL) for no_rekening in bank.accounts]
        mixed = 10 * tabung + 9 * tarik + refused
        chance = random.Random(1)
        chance.shuffle(mixed)
        strangers = [str(FIRST + chance.randrange(2 * len(tabung))) for _ in range(5000)]
        guesses = [post("/tabung", one, 1, f"{chance.randrange(10**6):06}") for one in strangers]
        self.cold = Load(bank.transaksi, tabung, 8)
        loads = {
            "no-op, 64": Load(bank.noop, tabung),
            "plain, 1": Load(bank.plain, tabung, 1),
            "plain, 64": Load(bank.plain, tabung),
            "tabung, 1": Load(bank.transaksi, tabung, 1),
            "tabung, 16": Load(bank.transaksi, tabung, 16),
            "tabung, 64": Load(bank.transaksi, tabung),
            "tabung, 256": Load(bank.transaksi, tabung, 256),
            "hot account, 64": Load(bank.transaksi, tabung[:1]),
            "mixed, 64": Load(bank.transaksi, mixed, accepted=0.95),
            "beside a flood, 64": Load(bank.transaksi, tabung, flood=guesses),
        }
        self.candidates: dict[str, Callable[[], Figure]] = {
            name: partial(measure, bank, load, seconds) for name, load in loads.items()
        }
        self.candidates["pgbench, 16"] = partial(pgbench, bank, seconds)
        self.candidates["end to end"] = lambda: end_to_end(
            bank, loads["tabung, 64"], seconds, self.rate("tabung, 64") / 2
        )
        self.candidates["drain"] = partial(drain, bank)

    def attempt(self, name: str, candidate: Callable[[], Figure]) -> None:
        figures, result = self.figures[name], "failed"
        try:
            figures.append(candidate())
            result = f"{figures[-1].rate:.0f} a second"
        except (Failed, OSError) as error:
            self.failed[name] = result = f"{type(error).__name__}: {error}"
        print(f"{name}: {result}", file=sys.stderr)

    def rate(self, name: str) -> float:
        if not self.figures[name]:
            raise Failed(f"needs {name}")
        return median(figure.rate for figure in self.figures[name])

    def rounds(self, count: int, only: Sequence[str]) -> None:
        """Get to know the customers, then let the candidates take turns."""
        self.attempt("bcrypt, all cores", partial(bcrypts, 2))
        known = partial(measure, self.bank, self.cold, 300, limit=len(self.cold.requests))
        self.attempt("cold PIN, 8", known)
        for _ in range(count):
            for name, candidate in self.candidates.items():
                if name.startswith(tuple(only)):
                    self.attempt(name, candidate)

    def ratios(self, promise: Promise) -> list[float]:
        """What each round gave; nothing where one of the loads failed."""
        names = (promise.load, *promise.against)
        if self.failed.keys() & set(names):
            return []
        columns = zip(*(map(promise.get, self.figures[name]) for name in names), strict=True)
        return [mine / max(others, default=1) for mine, *others in columns]


def environment(bank: Bank) -> dict[str, str]:
    """The machine, the versions and the settings behind the figures."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    disk = ["df", "--output=fstype", str(bank.postgres.directory)]
    packages = (
        "fastapi",
        "uvicorn",
        "uvloop",
        "httptools",
        "pydantic",
        "sqlalchemy",
        "psycopg2-binary",
        "redis",
    )
    names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method")
    server = bank.stream.info("server")
    return {
        "machine": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()} {platform.release()}, "
        + subprocess.run(disk, capture_output=True, text=True, check=True).stdout.split()[-1],
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages),
        "PostgreSQL": ", ".join(f"{name} {bank.sql(f'SHOW {name}')[0][0]}" for name in names),
        "Redis": f"{server.get('valkey_version') or server['redis_version']}, "
        + ", ".join(f"{k} {v}" for k, v in bank.stream.config_get("append*").items() if k in REDIS_SETTINGS),
    }


def middle(values: Iterable[float | None], scale: float, digits: int = 0) -> str:
    known = [value for value in values if value is not None]
    return f"{scale * median(known):.{digits}f}" if known else "-"


def report(run: Run) -> Iterator[str]:
    """The tables."""
    costs = ("served", "PostgreSQL", "Redis", "mutasi", "generator")
    yield f"{'':20}{'':>9}{'ms':>8}{'ms':>9}{'CPU us a request: the server itself, and the others':>55}{'s':>8}"
    yield (
        f"{'load, connections':20}{'a second':>9}{'p50':>8}{'p99':>9}"
        + "".join(f"{c:>11}" for c in costs)
        + f"{'behind':>8}"
    )
    for name in run.figures:
        if name in run.failed:
            yield f"{name:20} {run.failed[name]}"
            continue
        f = run.figures[name]
        yield (
            f"{name:20}{middle((x.rate for x in f), 1):>9}"
            f"{middle((x.p50 for x in f), 1e3, 2):>8}{middle((x.p99 for x in f), 1e3, 1):>9}"
            + "".join(f"{middle((x.cpu.get(c) for x in f), 1e6):>11}" for c in costs)
            + f"{middle((x.behind for x in f), 1, 1):>8}"
        )
    yield ""
    yield f"{'promise':40}{'measured':>9}{'rounds':>16}{'must':>8}{'goal':>8}"
    for p in PROMISES:
        if got := run.ratios(p):
            sign = "<=" if p.at_most else ""
            yield (
                f"{p.name:40}{median(got):>9.2f}{f'{min(got):.2f} - {max(got):.2f}':>16}"
                f"{f'{sign}{p.must}':>8}{f'{sign}{p.goal}':>8}  {p.verdict(median(got))}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="of each load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--accounts", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="LOAD", help="loads that begin so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to a file too")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        bank = Bank(stack, options.accounts)
        bank.open()
        facts = environment(bank)
        run = Run(bank, options.seconds)
        run.rounds(options.rounds, options.only)
    print(*(f"{name}: {fact}" for name, fact in facts.items()), "", *report(run), sep="\n")
    if options.json:
        loads = {name: [asdict(f) for f in figures] for name, figures in run.figures.items()}
        promises = {p.name: {"rounds": run.ratios(p), "must": p.must, "goal": p.goal} for p in PROMISES}
        content = {"environment": facts, "loads": loads, "failed": run.failed, "promises": promises}
        options.json.write_text(json.dumps(content, indent=1))
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
