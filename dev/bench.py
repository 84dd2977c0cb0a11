"""Measure throughput, latency and CPU per request, on servers of its own: `python -m dev.bench`.

Each load is a closed loop, in which a connection sends its next request when it has the answer to the
last; only "200 to row" is paced, at half the rate of "tabung, 64". The loads take turns for some rounds: a
figure is the median of its rounds, a ratio is taken within each round. transaksi runs with
`--auth-cache-ttl 3600`, so that only a customer's first request costs a bcrypt. Generators, services and
servers share the machine. After each load, all movements must be booked and the audit must find no
difference; otherwise the load has no figure, and the exit status is 1.
"""

import argparse
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import count, islice
from math import inf
from multiprocessing import get_context
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import bcrypt
import psutil
import psycopg2

from conftest import PIN, PIN_HASH, Servers
from dev.generator import Failed, Figure, Load, fire, http, percentiles
from dev.local import Postgres, Redis, Server

CORES = os.cpu_count() or 1
# The plain way (references.py) books no mutations: it has the accounts that begin with 7.
AUDIT = """SELECT no_rekening FROM audit_saldo
WHERE selisih_transaksi <> 0 OR selisih_mutasi <> 0 AND no_rekening < '7'"""
# A subquery, because without statistics the plan of a join reads the whole journal.
BOOKED = """SELECT id_transaksi, no_rekening, (SELECT saldo_akhir FROM transaksi WHERE id = id_transaksi)
FROM mutasi WHERE id_transaksi > %s"""
COSTS = (
    "own us",
    "mutasi us",
    "PostgreSQL us",
    "Redis us",
)  # CPU per request; own: of the server under load
MEMORY = ("transaksi MiB", "mutasi MiB")
COLUMNS = ("a second", "p50 ms", "p99 ms", "beside/s", "booked s", *COSTS, "generator us", *MEMORY)
RATIOS: tuple[
    tuple[str, ...], ...
] = (  # name, column, load, the loads by whose highest figure it is divided
    ("tabung / no-op", "a second", "tabung, 64", "no-op, 64"),
    ("no-op / tabung by CPU", "own us", "no-op, 64", "tabung, 64"),
    ("hot account / 1,000 accounts", "a second", "hot account, 64", "tabung, 64"),
    ("tabung / plain", "a second", "tabung, 64", "plain, 64"),
    ("tabung / plain, p50 of one connection", "p50 ms", "tabung, 1", "plain, 1"),
    ("200 to row at half load, p50 ms", "p50 ms", "200 to row"),
    ("200 to row at half load, p99 ms", "p99 ms", "200 to row"),
    ("drain / produce", "a second", "drain", "tabung, 64", "tabung, 256"),
    ("first requests / bcrypt on all cores", "a second", "first requests, 8", "bcrypt, all cores"),
    ("first request on an idle machine, ms", "p50 ms", "first request, 1"),
    ("beside first requests / without", "a second", "beside first requests, 64", "tabung, 64"),
    ("beside 64 guessing / without", "a second", "beside guessing, 64", "tabung, 64"),
    ("beside 64 reading / without", "a second", "beside reading, 64", "tabung, 64"),
    ("memory of transaksi, 1,000,000 / 100,000", "transaksi MiB", "1,000,000 sent", "100,000 sent"),
    ("memory of mutasi, 1,000,000 / 100,000", "mutasi MiB", "1,000,000 sent", "100,000 sent"),
)


class Bench:
    """The servers, services and accounts of a run, and what was measured on them."""

    def __init__(self, stack: ExitStack) -> None:
        self.figures: dict[str, list[Figure]] = defaultdict(list)
        self.failures: dict[str, str] = {}
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="tabungan-bench-")))
        directory.chmod(0o711)  # run by root, PostgreSQL is another user
        self.postgres = stack.enter_context(Postgres(directory / "postgres"))
        self.redis = stack.enter_context(Redis(directory / "redis"))
        servers = Servers(directory, self.postgres, self.redis)
        self.stream, self.db = servers.stream, psycopg2.connect(self.postgres.url())
        self.db.autocommit = True
        url = {"DB_URL": self.postgres.url().replace(":", "+psycopg2:", 1)}
        references = [(sys.executable, "-m", "dev.references", name) for name in ("noop", "plain")]
        self.mutasi, self.transaksi, self.noop, self.plain = (
            stack.enter_context(service)
            for service in (
                servers.service("mutasi"),
                servers.service("transaksi", "--auth-cache-ttl", "3600"),
                *(servers.service("transaksi", python=one, environment=url) for one in references),
            )
        )
        self.generators = stack.enter_context(ProcessPoolExecutor(2, get_context("spawn")))
        self.numbers = count(6_000_000_000)
        self.accounts = self.open(1000, self.numbers)

    def sql(self, query: str, *parameters: Any) -> list[Any]:
        with self.db.cursor() as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def open(self, number: int, numbers: Iterable[int]) -> list[str]:
        """Open accounts; return their numbers."""
        accounts = [str(no) for no in islice(numbers, number)]
        opened = "SELECT buka_rekening(no, 'Nasabah', %s, 0) FROM unnest(%s) no"
        self.sql(opened, PIN_HASH, accounts)
        return accounts

    def all_booked(self) -> bool:
        return not self.stream.xlen("mutasi") and not self.sql("SELECT 1 FROM outbox LIMIT 1")

    def wait(self, done: Callable[[], bool]) -> float:
        """Wait until all movements are booked, or sent; return the seconds."""
        began = time.monotonic()
        while not done():
            if time.monotonic() > began + 120:
                raise Failed("not all movements were sent or booked within 120 s")
            time.sleep(0.02)
        return time.monotonic() - began

    def cpu(self, own: Server) -> list[float]:
        """CPU seconds of the servers so far, with those of their children, ended ones too."""
        totals = []
        for server in (own, self.mutasi, self.postgres, self.redis):
            process, total = psutil.Process(server.pid), 0.0
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += sum(one.cpu_times()[:4])
            totals.append(total)
        return totals

    def measure(self, own: Server, *loads: Load) -> Figure:
        """Send loads at once. Returns the figure of the first."""
        self.sql("CHECKPOINT")
        before = self.cpu(own)
        jobs = [self.generators.submit(fire, load) for load in loads]
        figure, *others = (job.result()[0] for job in jobs)
        if others:
            figure["beside/s"] = others[0]["a second"]
        return self.finish(figure, own, before)

    def finish(self, figure: Figure, own: Server, before: list[float]) -> Figure:
        """Wait until all is booked, and add the CPU per request since `before`."""
        figure["booked s"] = self.wait(self.all_booked)
        for name, now, then in zip(COSTS, self.cpu(own), before, strict=True):
            figure[name] = (now - then) / figure["count"] * 1e6
        return figure

    def booked(self, load: Load) -> Figure:
        """From each 200 to the row in the mutation book, as another session sees it.

        A deposit is known by account and balance; the machine's monotonic clock times both ends.
        """
        rates = [figure["a second"] for figure in self.figures["tabung, 64"]]
        ((last,),) = self.sql("SELECT max(id_transaksi) FROM mutasi")
        job = self.generators.submit(fire, load._replace(rate=median(rates or [1000]) / 2))
        seen: dict[tuple[str, int], float] = {}
        ended = False
        while not ended:
            ended = job.done() and self.all_booked()
            rows, now = self.sql(BOOKED, last), time.monotonic()
            last = max([last, *(row[0] for row in rows)])
            seen |= {row[1:]: now for row in rows}
            time.sleep(0.003)
        late = []
        for number, _, received, answer in job.result()[1]:
            saldo = int(answer[answer.rindex(b":") + 1 : -1])
            late.append(seen[self.accounts[number % len(self.accounts)], saldo] - received)
        return {"a second": len(late) / load.seconds} | percentiles(late)

    def drain(self, load: Load) -> Figure:
        """How fast mutasi books a backlog, which was made while it was paused."""
        os.kill(self.mutasi.pid, SIGSTOP)
        try:
            self.generators.submit(fire, load).result()
            self.wait(lambda: self.stream.xlen("mutasi") >= len(load.requests))
            before = self.cpu(self.mutasi)
        finally:
            os.kill(self.mutasi.pid, SIGCONT)
        figure = self.finish({"count": len(load.requests)}, self.mutasi, before)
        return figure | {"a second": figure["count"] / figure["booked s"]}

    def first(self, number: int, connections: int, seconds: float = inf) -> Load:
        """The first requests of new customers."""
        requests = [http("/tabung", no) for no in self.open(number, self.numbers)]
        return Load(self.transaksi.port, requests, connections, seconds)

    def loads(self, seconds: int) -> dict[str, Callable[[], Figure]]:
        bank, measure = self.transaksi, self.measure
        deposits = [http("/tabung", no) for no in self.accounts]
        load = Load(bank.port, deposits, 64, seconds)
        plain = [http("/tabung", no) for no in self.open(1000, count(7_000_000_000))]
        plain_load = load._replace(port=self.plain.port, requests=plain)
        paths = ("/saldo", "/mutasi")
        reads = load._replace(requests=[http(path, no) for no in self.accounts for path in paths])
        strangers = [*self.accounts, *map(str, range(8_000_000_000, 8_000_001_000))]
        guesses = [http("/tabung", no, f"{pin:06}") for pin, no in enumerate(strangers)]
        flood = load._replace(requests=guesses, statuses=(b"401", b"503"))
        return {
            "no-op, 64": lambda: measure(self.noop, load._replace(port=self.noop.port)),
            "tabung, 64": lambda: measure(bank, load),
            "hot account, 64": lambda: measure(bank, load._replace(requests=deposits[:1])),
            "plain, 64": lambda: measure(self.plain, plain_load),
            "plain, 1": lambda: measure(self.plain, plain_load._replace(connections=1)),
            "tabung, 1": lambda: measure(bank, load._replace(connections=1)),
            "tabung, 16": lambda: measure(bank, load._replace(connections=16)),
            "tabung, 256": lambda: measure(bank, load._replace(connections=256)),
            "beside guessing, 64": lambda: measure(bank, load, flood),
            "beside reading, 64": lambda: measure(bank, load, reads),
            "beside first requests, 64": lambda: measure(
                bank, load, self.first(30 * CORES * seconds, 8, seconds)
            ),
            "first requests, 8": lambda: measure(bank, self.first(30 * CORES, 8)),
            "bcrypt, all cores": bcrypts,
            "first request, 1": lambda: measure(bank, self.first(8, 1)),
            "200 to row": lambda: self.booked(load),
            "drain": lambda: self.drain(load._replace(requests=50 * deposits, seconds=inf)),
        }

    def grow(self) -> Figure:
        """100,000 movements, and the memory of the services after them."""
        requests = 100 * [http("/tabung", no) for no in self.accounts]
        figure = self.measure(self.transaksi, Load(self.transaksi.port, requests, 64, inf))
        for name, service in zip(MEMORY, (self.transaksi, self.mutasi), strict=True):
            figure[name] = psutil.Process(service.pid).memory_info().rss / 2**20
        return figure

    def attempt(self, name: str, measure: Callable[[], Figure]) -> None:
        try:
            figure = measure()
            if differences := self.sql(AUDIT):
                raise Failed(f"audit: {differences[:3]}")
            self.figures[name].append(figure)
            result = f"{figure['a second']:.0f}"
        except (Failed, OSError, KeyError) as error:
            self.failures[name] = result = f"failed: {type(error).__name__} {error}"
        print(f"{name}: {result}", file=sys.stderr)

    def report(self) -> None:
        """Print the loads, then the ratios."""
        figures = {name: got for name, got in self.figures.items() if name not in self.failures}
        shown = [
            c
            for c in COLUMNS
            if any(c in figure for rounds in figures.values() for figure in rounds)
        ]
        print(platform.platform(), f"{CORES} cores, Python {platform.python_version()}")
        row("load, connections", *shown)
        for name, rounds in figures.items():
            cells = ([figure[column] for figure in rounds if column in figure] for column in shown)
            row(name, *(median(cell) if cell else "" for cell in cells))
        row()
        row("ratio", "median", "least", "most")
        for ratio, column, *loads in RATIOS:
            columns = ([figure[column] for figure in figures.get(load, [])] for load in loads)
            if got := [
                mine / max(others, default=1) for mine, *others in zip(*columns, strict=False)
            ]:
                row(ratio, median(got), min(got), max(got))
        for name, failure in self.failures.items():
            row(name, failure)


def bcrypts() -> Figure:
    began, hashes = time.monotonic(), 30 * CORES
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(bcrypt.checkpw, hashes * [PIN.encode()], hashes * [PIN_HASH.encode()]))
    return {"a second": hashes / (time.monotonic() - began)}


def row(name: str = "", *cells: float | str) -> None:
    texts = (c if isinstance(c, str) else f"{c:.0f}" if c >= 100 else f"{c:.3g}" for c in cells)
    print(f"{name:41}", *(f"{text:>13}" for text in texts))


def main() -> int:
    parser = argparse.ArgumentParser("python -m dev.bench", description=__doc__)
    parser.add_argument(
        "--seconds", type=int, default=2, help="of each load (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="LOAD", help="those whose names begin so"
    )
    parser.add_argument(
        "--long", action="store_true", help="instead: memory after 1,000,000 movements"
    )
    options = parser.parse_args()
    with ExitStack() as stack:
        bench = Bench(stack)
        warm = Load(bench.transaksi.port, [http("/tabung", no) for no in bench.accounts], 8, inf)
        bench.attempt(
            "first requests, 1,000 customers", lambda: bench.measure(bench.transaksi, warm)
        )
        for n in range(1, 11 if options.long else 1):
            bench.attempt(f"{n}00,000 sent" if n < 10 else "1,000,000 sent", bench.grow)
        loads = {} if options.long else bench.loads(options.seconds)
        for _ in range(options.rounds):
            for name, measure in loads.items():
                if name.startswith(tuple(options.only)):
                    bench.attempt(name, measure)
        bench.report()
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
