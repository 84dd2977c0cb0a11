"""The benchmark: `python -m dev.bench` measures everything in one run, on servers of its own.

The candidates take turns, some rounds over. A figure is the median of the rounds, a ratio that of each
round's. After every load outbox and stream must become empty and the audit be zero; otherwise the failure is
printed instead of the figure, and the exit status is 1. No process is pinned: generator, services and servers
share the machine.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import bcrypt
import psycopg2
import redis
import sqlalchemy
from fastapi import FastAPI

from dev.local import HOST, ROOT, Postgres, Redis, Server, Service, data_directory, inherited_environment
from servers import STREAM
from transaksi.api import Permintaan, Saldo
from transaksi.app import MAX_NOMINAL
from transaksi.datastore import Rekening, Transaksi

FIRST = 6_000_000_000
BACKLOG = 100_000
PATIENCE_S = 120
PIN = "123456"
PIN_HASH = "$2b$10$CxlNcIK8q19til.lbenvnuJlfS/0p3G3DAT5tMDHzVeYB1zUfq8aW"  # of PIN, as in init.sql
PLAIN_DB = "polos"  # the references' own copy: their movements have no mutations
AUDIT = "SELECT count(*) FROM audit_saldo WHERE (selisih_transaksi, selisih_mutasi, beda) <> (0, 0, 0)"
PLAIN_AUDIT = "SELECT count(*) FROM audit_saldo WHERE selisih_transaksi <> 0"
PGBENCH = """\\set no random({first}, {last})
WITH r AS (UPDATE rekening SET saldo = saldo + 1 WHERE no_rekening = (:no)::text
        RETURNING no_rekening, saldo),
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
ARRIVED = """
SELECT id_transaksi, no_rekening, (SELECT saldo_akhir FROM transaksi WHERE id = id_transaksi)
FROM mutasi WHERE id_transaksi > %s
"""  # not a join, whose plan without statistics reads the whole journal

Figure = dict[str, float]  # the columns of one measured load; "own" is the server that the load is for
COSTS = [f"{name} us" for name in ("own", "PostgreSQL", "Redis", "mutasi", "generator")]
COLUMNS = ("a second", "p50 ms", "p99 ms", "behind s", *COSTS, "MiB")


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
    """The plain way: a transaction of three statements per request, no authentication, no outbox."""
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


@dataclass(frozen=True)
class Shots:
    """What came back: answers by status, latencies, the generator's own CPU seconds."""

    statuses: Counter[str]
    seconds: float
    latency: Figure
    cpu: float
    answered: Sequence[tuple[int, float, bytes]] = ()  # of a paced load: which request, when, what


def percentiles(latencies: Iterable[float]) -> Figure:
    """Of seconds."""
    ordered = sorted(latencies)
    return {f"p{p} ms": 1000 * ordered[len(ordered) * p // 100] for p in (50, 99)}


def fire(
    port: int, requests: Sequence[bytes], connections: int, seconds: float, rate: float = 0, limit: int | None = None
) -> Shots:
    """Keep `connections` busy for `seconds` or `limit` requests, cycling over those given.

    A raw client on epoll, lighter than asyncio: what it spends the services cannot. Paced by `rate` a second.
    """
    poll = select.epoll()
    lines = [socket.create_connection((HOST, port)) for _ in range(connections)]
    free = {line.fileno(): line for line in lines}
    for line in lines:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(line, select.EPOLLIN)
    todo = islice(cycle(enumerate(requests)), limit)
    busy: dict[int, tuple[socket.socket, int, float]] = {}
    parts: dict[int, bytes] = {}
    statuses: Counter[str] = Counter()
    latencies, answered = [], []
    cpu, began = time.process_time(), time.monotonic()
    now = due = began
    end = began + seconds
    while True:
        while free and due <= now < end and (following := next(todo, None)):
            fd, line = free.popitem()
            number, request = following
            busy[fd] = line, number, time.monotonic()
            line.sendall(request)
            due += 1 / rate if rate else 0
        if not busy and (now >= end or not rate):
            break
        idle = bool(rate and free)
        events = poll.poll(max(0.0, due - now) if idle else 30)
        if not events and not idle:
            raise Failed("no answer within 30 s")
        for fd, _ in events:
            line, number, since = busy[fd]
            part = line.recv(65536)
            whole = parts.pop(fd, b"") + part
            if not part:
                raise Failed("the server hung up")
            if not whole.endswith(b"}"):  # every answer is one flat JSON object
                parts[fd] = whole
                continue
            now = time.monotonic()
            del busy[fd]
            free[fd] = line
            latencies.append(now - since)
            statuses[whole[9:12].decode()] += 1
            if rate:
                answered.append((number, now, whole))
        now = time.monotonic()
    for line in lines:
        line.close()
    return Shots(statuses, now - began, percentiles(latencies), time.process_time() - cpu, answered)


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Load:
    """What is sent where, and the share of it that must be answered 200, the rest 400."""

    server: Server
    requests: Sequence[bytes]
    connections: int = 64
    accepted: float = 1.0
    flood: Sequence[bytes] = ()


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


def rss_mib(server: Server) -> float:
    """Resident memory of a process, without children."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Bank:
    """Servers, services and accounts of the run, all ended when the `stack` is left."""

    def __init__(self, stack: ExitStack, accounts: int) -> None:
        self._stack = stack
        self.directory = stack.enter_context(data_directory(None))
        self.directory.chmod(0o711)  # run by root, PostgreSQL is another user
        self.accounts = [str(FIRST + n) for n in range(accounts)]
        self.postgres = Postgres(self.directory / "postgres")
        self.redis = Redis(self.directory / "redis")
        self.plain_url = self.postgres.url().removesuffix("tabungan") + PLAIN_DB
        self.noop = Reference("noop", self.directory)
        self.plain = Reference("plain", self.directory, DB_URL=self.plain_url)
        self.mutasi = self.service("mutasi")
        self.transaksi = self.service("transaksi", "--auth-cache-ttl", "3600")
        self.two = self.service("transaksi", "--auth-cache-ttl", "3600", "--workers", "2")
        self.stream = redis.Redis(port=self.redis.port, password=self.redis.password)
        self.generators = ProcessPoolExecutor(2, get_context("spawn"))
        stack.callback(self.generators.shutdown)

    def service(self, name: str, *arguments: str) -> Service:
        return Service(name, self.postgres, self.redis, *arguments, directory=self.directory)

    def start(self, *servers: Server) -> None:
        for server in servers:
            self._stack.enter_context(server)

    def open(self) -> None:
        """Start everything and open the accounts; their customers are still unknown to transaksi."""
        self.start(self.postgres, self.redis)
        opened = "SELECT buka_rekening(no, 'Nasabah', %(pin_hash)s, 1000000) FROM unnest(%(accounts)s) no"
        self.sql(opened, pin_hash=PIN_HASH, accounts=self.accounts)
        self.sql(f"CREATE DATABASE {PLAIN_DB} TEMPLATE tabungan")
        self.start(self.noop, self.plain, self.mutasi, self.transaksi)

    def sql(self, query: str, url: str = "", **parameters: Any) -> Any:
        """The first column of the first row, where there is one."""
        with closing(psycopg2.connect(url or self.postgres.url())) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(query, parameters)
                return (cursor.fetchone() or (None,))[0] if cursor.description else None

    def idle(self) -> bool:
        """Whether transaksi has nothing to do, such as the last PIN checks of a flood."""
        before = self.cpu()["transaksi"]
        time.sleep(0.2)
        return self.cpu()["transaksi"] - before < 0.05

    def cpu(self) -> dict[str, float]:
        """CPU seconds that each server has used so far."""
        servers = (self.noop, self.plain, self.mutasi, self.transaksi, self.two, self.postgres, self.redis)
        return {server.name: cpu_seconds(server) for server in servers if server.running}

    def settle(self) -> float:
        """Wait until the last movement is in the mutation book; the seconds it took."""
        began = time.monotonic()
        outbox = "SELECT count(*) FROM outbox"
        wait(lambda: self.sql(outbox) == 0 == self.stream.xlen(STREAM), "outbox or stream")
        return time.monotonic() - began

    def cost(self, before: dict[str, float], count: int, own: Server) -> Figure:
        """CPU microseconds a request since `before`."""
        cpu = {f"{name} us": (now - before[name]) / count * 1e6 for name, now in self.cpu().items()}
        return cpu | {"own us": cpu[f"{own.name} us"]}

    def audit(self) -> None:
        """Whatever is still under way gets the time to arrive; a difference stays one."""
        wait(self.idle, "the load")
        wait(lambda: self.sql(AUDIT) == 0, "audit: differences", 10)
        wait(lambda: self.sql(PLAIN_AUDIT, self.plain_url) == 0, "audit: differences of the plain way", 1)


def wait(done: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise Failed(f"{what} still there after {seconds} s")
        time.sleep(0.02)


def measure(bank: Bank, load: Load, seconds: float, limit: int | None = None) -> Figure:
    """The figure of a load, once all it moved is in the mutation book and the audit is zero."""
    bank.sql("CHECKPOINT")  # so that none comes by chance
    before = bank.cpu()
    target = (load.server.port, load.requests, load.connections, seconds)
    job = bank.generators.submit(fire, *target, limit=limit)
    if load.flood:
        bank.generators.submit(fire, load.server.port, load.flood, 64, seconds).result()
    shots = job.result()
    count = shots.statuses.total()
    figure = {"a second": count / shots.seconds, "generator us": shots.cpu / count * 1e6} | shots.latency
    figure |= {"behind s": bank.settle()} | bank.cost(before, count, load.server)
    if set(shots.statuses) - {"200", "400"} or abs(shots.statuses["200"] / count - load.accepted) > 0.01:
        raise Failed(f"answers {dict(shots.statuses)}")
    if limit and count < limit:
        raise Failed(f"{count} of {limit} requests were sent")
    bank.audit()
    return figure


def end_to_end(bank: Bank, load: Load, seconds: float, rate: float) -> Figure:
    """From the client's 200 to the mutation row, for every deposit of a paced load.

    The book is read every 3 ms in a session of its own, so a row counts when others can see it. A deposit is
    known by account and balance; both ends are timed by the machine's one monotonic clock.
    """
    last = bank.sql("SELECT max(id) FROM transaksi")
    seen: dict[tuple[str, int], float] = {}
    job = bank.generators.submit(fire, load.server.port, load.requests, load.connections, seconds, rate)
    with closing(psycopg2.connect(bank.postgres.url())) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        ended = None
        while not ended or time.monotonic() < ended + 2:
            cursor.execute(ARRIVED, (last,))
            rows, now = cursor.fetchall(), time.monotonic()
            last = max([last, *(row[0] for row in rows)])
            seen |= {row[1:]: now for row in rows}
            ended = ended or (now if job.done() else None)
            time.sleep(0.003)
    bank.settle()
    bank.audit()
    late = []
    for number, answered, body in job.result().answered:
        deposit = bank.accounts[number % len(bank.accounts)], int(body[body.rindex(b":") + 1 : -1])
        if deposit not in seen:
            raise Failed("a mutation was not seen to arrive in the order of ids")
        late.append(seen[deposit] - answered)
    return {"a second": len(late) / seconds} | percentiles(late)


def drain(bank: Bank) -> Figure:
    """How fast mutasi works off a backlog that stands in the stream."""
    bank.mutasi.stop()
    each = BACKLOG // len(bank.accounts)
    bank.sql(FILL, each=each, accounts=bank.accounts)
    wait(lambda: bool(bank.stream.xlen(STREAM) >= each * len(bank.accounts)), "the outbox")
    bank.mutasi.start()
    before, began = bank.cpu(), time.monotonic()
    wait(lambda: bank.stream.xlen(STREAM) == 0, "the stream")
    rate = BACKLOG / (time.monotonic() - began)
    figure = {"a second": rate} | bank.cost(before, BACKLOG, bank.mutasi)
    bank.settle()
    bank.audit()
    return figure


def pgbench(bank: Bank, seconds: float) -> Figure:
    """The same movement as one statement, from PostgreSQL's own load generator."""
    script = bank.directory / "pgbench.sql"
    script.write_text(PGBENCH.format(first=bank.accounts[0], last=bank.accounts[-1]))
    options = ("-n", "-M", "prepared", "-c", "16", "-j", "2", "-T", str(round(seconds)))
    before = bank.cpu()
    output = subprocess.run(
        [bank.postgres.programs / "pgbench", *options, "-f", script, bank.plain_url],
        env=inherited_environment(),
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = re.search(r"processed: (\d+)\n.*failed transactions: 0 (?s:.*)tps = ([\d.]+)", output)
    if not found:
        raise Failed(f"pgbench: {output}")
    figure = {"a second": float(found[2])} | bank.cost(before, int(found[1]), bank.postgres)
    bank.audit()
    return figure


def bcrypts(seconds: float) -> Figure:
    """What all the cores together can hash."""
    cores, end = os.cpu_count() or 1, time.monotonic() + seconds

    def hash_on() -> int:
        done = 0
        while time.monotonic() < end:
            done += bcrypt.checkpw(PIN.encode(), PIN_HASH.encode())
        return done

    with ThreadPoolExecutor(cores) as pool:
        jobs = [pool.submit(hash_on) for _ in range(cores)]
    return {"a second": sum(job.result() for job in jobs) / seconds}


# ---------------------------------------------------------------- the run

Figures = dict[str, list[Figure]]


@dataclass(frozen=True)
class Promise:
    """What the README claims under "Measured" of a load, against the best of others where there are any."""

    name: str
    load: str
    against: tuple[str, ...]
    must: float
    goal: float | None = None
    column: str = "a second"
    at_most: bool = False

    def rounds(self, figures: Figures) -> list[float]:
        """What each round gave; nothing where a load was not measured."""
        loads = [figures.get(name, []) for name in (self.load, *self.against)]
        return [
            mine[self.column] / max((other[self.column] for other in others), default=1)
            for mine, *others in zip(*loads, strict=False)  # shortest: a load that was left out
        ]

    def verdict(self, got: float) -> str:
        sign = -1 if self.at_most else 1
        if self.goal is not None and sign * got >= sign * self.goal:
            return "goal"
        return "reached" if sign * got >= sign * self.must else "SHORT"


MOVEMENTS = (100_000, 1_000_000)
AFTER = [f"after {count:,}" for count in MOVEMENTS]
PROMISES = (
    Promise("tabung / no-op", "tabung, 64", ("no-op, 64",), 0.45, 0.7),
    Promise("the same by CPU, no-op / tabung", "no-op, 64", ("tabung, 64",), 0.45, 0.7, "own us"),
    Promise("hot account / 1,000 accounts", "hot account, 64", ("tabung, 64",), 0.9, 1.0),
    Promise("tabung / plain", "tabung, 64", ("plain, 64",), 2.5, 4),
    Promise("tabung / plain, p50 of one connection", "tabung, 1", ("plain, 1",), 1.3, None, "p50 ms", at_most=True),
    Promise("beside a flood / without", "beside a flood, 64", ("tabung, 64",), 0.5),
    Promise("drain / produce", "drain", ("tabung, 64", "tabung, 256"), 3, 10),
    Promise("200 to mutation row, p99 ms", "end to end", (), 100, 25, "p99 ms", at_most=True),
    *(
        Promise(f"memory of {s}", f"{s} {AFTER[1]}", (f"{s} {AFTER[0]}",), 1.1, 1.05, "MiB", at_most=True)
        for s in ("transaksi", "mutasi")
    ),
)


class Run:
    """The candidates, and what was measured of them."""

    def __init__(self, bank: Bank, seconds: int) -> None:
        self.bank = bank
        self.figures: Figures = defaultdict(list)
        self.failed: dict[str, str] = {}
        self.tabung = [post("/tabung", no_rekening, 1000) for no_rekening in bank.accounts]
        tarik = [post("/tarik", no_rekening, 1000) for no_rekening in bank.accounts]
        too_much = [post("/tarik", no_rekening, MAX_NOMINAL) for no_rekening in bank.accounts]
        chance = random.Random(1)
        mixed = 10 * self.tabung + 9 * tarik + too_much
        chance.shuffle(mixed)
        strangers = [str(FIRST + chance.randrange(2 * len(self.tabung))) for _ in range(5000)]
        guesses = [post("/tabung", one, 1, f"{chance.randrange(10**6):06}") for one in strangers]
        transaksi = partial(Load, bank.transaksi)
        loads = {
            "no-op, 64": Load(bank.noop, self.tabung),
            "tabung, 64": transaksi(self.tabung),
            "hot account, 64": transaksi(self.tabung[:1]),
            "plain, 64": Load(bank.plain, self.tabung),
            "beside a flood, 64": transaksi(self.tabung, flood=guesses),
            "mixed, 64": transaksi(mixed, accepted=0.95),
            "plain, 1": Load(bank.plain, self.tabung, 1),
            "tabung, 1": transaksi(self.tabung, 1),
            "tabung, 16": transaksi(self.tabung, 16),
            "tabung, 256": transaksi(self.tabung, 256),
        }
        self.candidates: dict[str, Callable[[], Figure]] = {
            name: partial(measure, bank, load, seconds) for name, load in loads.items()
        }
        self.candidates["pgbench, 16"] = partial(pgbench, bank, seconds)
        self.candidates["end to end"] = lambda: end_to_end(bank, loads["tabung, 64"], seconds, self.half())
        self.candidates["drain"] = partial(drain, bank)

    @property
    def measured(self) -> Figures:
        return {name: got for name, got in self.figures.items() if got and name not in self.failed}

    def half(self) -> float:
        """Half of the load that 64 connections make."""
        rates = [figure["a second"] for figure in self.figures["tabung, 64"]]
        return median(rates) / 2 if rates else 500

    def attempt(self, name: str, candidate: Callable[[], Figure]) -> None:
        try:
            self.figures[name].append(figure := candidate())
            result = f"{figure['a second']:.0f}"
        except (Failed, OSError) as error:
            self.failed[name] = result = f"{type(error).__name__}: {error}"
        print(f"{name}: {result}", file=sys.stderr)

    def get_known(self, server: Server) -> Figure:
        """The first request of every customer: from then on he is remembered."""
        return measure(self.bank, Load(server, self.tabung, 8), math.inf, limit=len(self.tabung))

    def rounds(self, count: int, only: Sequence[str]) -> None:
        """Get to know the customers, then let the candidates take turns."""
        self.attempt("bcrypt, all cores", partial(bcrypts, 2))
        self.attempt("cold PIN, 8", partial(self.get_known, self.bank.transaksi))
        for _ in range(count):
            for name, candidate in self.candidates.items():
                if name.startswith(tuple(only)):
                    self.attempt(name, candidate)

    def long(self, seconds: int) -> None:
        """Memory of fresh processes as movements go by, then two workers."""
        bank = self.bank
        bank.sql("UPDATE kredensial SET pin_gagal = 0, terkunci_sampai = NULL")  # the flood's
        for service in (bank.mutasi, bank.transaksi):
            service.stop()
            service.start()
        self.get_known(bank.transaksi)
        began, load = bank.sql("SELECT count(*) FROM transaksi"), Load(bank.transaksi, self.tabung)
        for name, count in zip(AFTER, MOVEMENTS, strict=True):
            left = count + began - bank.sql("SELECT count(*) FROM transaksi")
            self.attempt(f"tabung, 64, {name}", partial(measure, bank, load, math.inf, limit=left))
            for service in (bank.transaksi, bank.mutasi):
                self.figures[f"{service.name} {name}"].append({"MiB": rss_mib(service)})
            stream = bank.stream.memory_usage(STREAM) or 0
            self.figures[f"stream {name}"].append({"MiB": stream / 2**20})
        bank.transaksi.stop()
        bank.start(bank.two)
        two = partial(Load, bank.two, self.tabung)
        for _ in range(10):  # each time on new connections, since each worker has to get to know everyone
            self.attempt("2 workers, cold", partial(measure, bank, two(32), math.inf, 2 * len(self.tabung)))
        self.attempt("2 workers, 64", partial(measure, bank, two(), seconds))


def environment(bank: Bank) -> dict[str, str]:
    """The machine, the versions and the settings behind the figures."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    df = ["df", "--output=fstype", str(bank.postgres.directory)]
    disk = subprocess.run(df, capture_output=True, text=True, check=True).stdout.split()[-1]
    system = f"{platform.system()} {platform.release()}, {disk}"
    packages = ("fastapi", "uvicorn", "uvloop", "pydantic", "sqlalchemy", "psycopg2-binary", "redis")
    durable = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method")
    fsync = bank.stream.config_get("appendfsync")["appendfsync"]
    return {
        "machine": f"{cpu[1] if cpu else ''}, {os.cpu_count()} cores, {memory:.0f} GiB, {system}",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]),
        "PostgreSQL": ", ".join(f"{name} {bank.sql(f'SHOW {name}')}" for name in durable),
        "Redis": f"{bank.stream.info('server')['redis_version']}, appendfsync {fsync}",
        "load": f"{len(bank.accounts)} accounts; one worker of transaksi, one mutasi",
    }


def shown(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        yield "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])


def report(run: Run) -> Iterator[str]:
    """The tables, and what failed."""

    figures = run.measured

    def cell(name: str, column: str) -> str:
        known = [figure[column] for figure in figures[name] if column in figure]
        return shown(median(known)) if known else ""

    loads = [[name, *(cell(name, column) for column in COLUMNS)] for name in figures]
    yield from aligned([["load, connections", *COLUMNS], *loads])
    yield from (f"{name}: {why}" for name, why in run.failed.items())
    promises = [["", "measured", "least", "most", "must", "goal", ""]]
    for p in PROMISES:
        if got := p.rounds(figures):
            spread = map(shown, (median(got), min(got), max(got)))
            limits = [f"{'<= ' if p.at_most else ''}{p.must}", f"{p.goal or ''}"]
            promises.append([p.name, *spread, *limits, p.verdict(median(got))])
    yield from ("", *aligned(promises))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.bench", description=__doc__)
    parser.add_argument("--seconds", type=int, default=2, help="of each load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--accounts", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="LOAD", help="loads whose names begin so")
    parser.add_argument("--long", action="store_true", help="memory after 1,000,000 movements, 2 workers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        bank = Bank(stack, options.accounts)
        bank.open()
        facts, run = environment(bank), Run(bank, options.seconds)
        run.rounds(options.rounds, options.only)
        if options.long:
            run.long(options.seconds)
    print(*(f"{name}: {fact}" for name, fact in facts.items()), "", *report(run), sep="\n")
    if options.json:
        ratios = {p.name: p.rounds(run.measured) for p in PROMISES}
        everything = {"environment": facts, "loads": run.measured, "failed": run.failed, "ratios": ratios}
        options.json.write_text(json.dumps(everything, indent=1))
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
