"""Measure throughput, latency and CPU per request on servers of its own: `python -m dev.bench`.

A connection sends its next request when it has the answer to the last; only "200 to row" is
paced, at half the rate of "tabung, 64". The loads take turns: a figure is the median of the
rounds, a ratio is taken within each. Only a customer's first request costs a bcrypt. After each
load all movements must be booked and the audit must find no difference; otherwise the load has
no figure, the run ends, and the exit status is 1.
"""

import argparse
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import bcrypt
import psutil
import psycopg2
from redis import Redis as RedisClient

from dev.generator import Figure, Load, http, measure, percentiles, send
from dev.local import PIN, PIN_HASH, Postgres, Redis, Server, Service

CORES = os.cpu_count() or 1
# The plain way books nothing: its accounts begin with 7.
AUDIT = """SELECT no_rekening FROM audit_saldo
WHERE selisih_transaksi <> 0 OR selisih_mutasi <> 0 AND no_rekening < '7'"""
# A subquery, because without statistics the plan of a join reads the whole journal.
BOOKED = """SELECT id_transaksi, (SELECT saldo_akhir FROM transaksi WHERE id = id_transaksi)
FROM mutasi WHERE id_transaksi > %s"""
COSTS = ("server us", "mutasi us", "PostgreSQL us", "Redis us")  # CPU per request

# Name, column, load, and the load by whose figure it is divided, if any.
ROWS = (
    ("tabung / no-op", "per second", "tabung, 64", "no-op, 64"),
    ("tabung / plain", "per second", "tabung, 64", "plain, 64"),
    ("one hot account / 1,000 accounts", "per second", "hot account, 64", "tabung, 64"),
    ("p50 of one connection, tabung / plain", "p50 ms", "tabung, 1", "plain, 1"),
    ("200 to mutation row at half load, p50 ms", "p50 ms", "200 to row"),
    ("200 to mutation row at half load, p99 ms", "p99 ms", "200 to row"),
    ("drain / produce", "per second", "drain", "tabung, 64"),
    ("first requests / bcrypt on all cores", "per second", "first, 8", "bcrypt, all cores"),
    ("first request on an idle machine, ms", "p50 ms", "first, 1"),
    ("beside 64 guessing / without", "per second", "beside guessing, 64", "tabung, 64"),
    ("beside 64 reading / without", "per second", "beside reading, 64", "tabung, 64"),
    ("CPU of transaksi per tabung, us", "server us", "tabung, 64"),
    ("CPU of mutasi per tabung, us", "mutasi us", "tabung, 64"),
    ("CPU of no-op per request, us", "server us", "no-op, 64"),
    ("two replicas / one", "per second", "replicas, 2 x 32", "tabung, 64"),
)


class Bench:
    """The servers, services and accounts of a run, and what was measured on them."""

    def __init__(self, stack: ExitStack) -> None:
        self.figures: dict[str, list[Figure]] = defaultdict(list)
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="tabungan-bench-")))
        directory.chmod(0o711)  # run by root, PostgreSQL is another user
        self.postgres = stack.enter_context(Postgres(directory / "postgres"))
        self.redis = stack.enter_context(Redis(directory / "redis"))
        self.stream = RedisClient(port=self.redis.port, password=self.redis.password)
        self.db = psycopg2.connect(self.postgres.url())
        self.db.autocommit = True
        pair = (self.postgres, self.redis)
        cached = ("transaksi", *pair, "--auth-cache-ttl", "3600")
        self.mutasi = Service("mutasi", *pair, directory=directory)
        self.transaksi, self.replica = (Service(*cached, directory=directory) for _ in range(2))
        python = (sys.executable, "-m", "dev.references")
        url = {"DB_URL": self.postgres.url("transaksi").replace(":", "+psycopg2:", 1)}
        self.noop, self.plain = (
            Service(
                "transaksi", *pair, directory=directory, python=(*python, name), environment=url
            )
            for name in ("noop", "plain")
        )
        services = (self.mutasi, self.transaksi, self.replica, self.noop, self.plain)
        self.services = {one.port: stack.enter_context(one) for one in services}
        self.generators = stack.enter_context(ProcessPoolExecutor(2, get_context("spawn")))
        self.numbers = map(str, count(6_000_000_000))
        self.accounts = self.new_customers(1000, self.numbers)

    def sql(self, query: str, *parameters: Any) -> list[Any]:
        with self.db.cursor() as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def new_customers(self, number: int, numbers: Iterator[str]) -> list[str]:
        """Open accounts. Returns their numbers."""
        accounts = list(islice(numbers, number))
        self.sql("SELECT buka_rekening(no, 'N', %s, 0) FROM unnest(%s) no", PIN_HASH, accounts)
        return accounts

    def all_booked(self) -> bool:
        return not self.stream.xlen("mutasi") and not self.sql("SELECT 1 FROM outbox LIMIT 1")

    def wait(self, is_done: Callable[[], bool]) -> float:
        began = time.monotonic()
        while not is_done():
            if time.monotonic() > began + 120:
                raise RuntimeError("not all movements were sent or booked within 120 s")
            time.sleep(0.02)
        return time.monotonic() - began

    def measure(self, *loads: Load) -> Figure:
        """Send loads at once. Returns the figure of the first, with the CPU per request."""
        self.sql("CHECKPOINT")
        servers = (self.services[loads[0].port], self.mutasi, self.postgres, self.redis)
        before = [cpu_seconds(one) for one in servers]
        figure, *_ = self.generators.map(measure, loads)
        self.wait(self.all_booked)
        for name, server, then in zip(COSTS, servers, before, strict=True):
            figure[name] = (cpu_seconds(server) - then) / figure["count"] * 1e6
        return figure

    def replicas(self, load: Load) -> Figure:
        """Split a load over two processes of transaksi."""
        half = load._replace(connections=load.connections // 2)
        halves = [half._replace(port=one.port) for one in (self.transaksi, self.replica)]
        figures = list(self.generators.map(measure, halves))
        self.wait(self.all_booked)
        return {"per second": sum(figure["per second"] for figure in figures)}

    def booked(self, load: Load) -> Figure:
        """Time each movement of an account from its 200 to its row in mutasi.

        The balance tells which it is; the machine's monotonic clock times both ends.
        """
        rates = [figure["per second"] for figure in self.figures["tabung, 64"]]
        ((last,),) = self.sql("SELECT max(id_transaksi) FROM mutasi")
        job = self.generators.submit(send, load._replace(rate=median(rates or [1000]) / 2))
        seen: dict[int, float] = {}
        while not (job.done() and self.all_booked() and not self.sql(BOOKED, last)):
            rows = self.sql(BOOKED, last)
            seen |= dict.fromkeys((saldo for _, saldo in rows), time.monotonic())
            last = max([last, *(id_transaksi for id_transaksi, _ in rows)])
            time.sleep(0.003)
        answers = {int(one.text.rpartition(b":")[2][:-1]): one for one in job.result()}
        return percentiles(seen[saldo] - answer.received for saldo, answer in answers.items())

    def drain(self, load: Load) -> Figure:
        """Measure how fast mutasi books movements that were accepted while it was paused."""
        movements = len(load.requests)
        os.kill(self.mutasi.pid, SIGSTOP)
        self.generators.submit(send, load).result()
        self.wait(lambda: self.stream.xlen("mutasi") >= movements)
        os.kill(self.mutasi.pid, SIGCONT)
        return {"per second": movements / self.wait(self.all_booked)}

    def first(self, customers: int, connections: int) -> Figure:
        requests = [http("/tabung", no) for no in self.new_customers(customers, self.numbers)]
        return self.measure(Load(self.transaksi.port, requests, connections))

    def loads(self, seconds: int) -> dict[str, Callable[[], Figure]]:
        deposits = [http("/tabung", no) for no in self.accounts]
        load = Load(self.transaksi.port, deposits, 64, seconds)
        others = self.new_customers(1000, map(str, count(7_000_000_000)))
        requests = [http("/tabung", no) for no in others]
        plain = load._replace(port=self.plain.port, requests=requests)
        requests = [http(path, no) for no in self.accounts for path in ("/saldo", "/mutasi")]
        reading = load._replace(requests=requests)
        unknown = map(str, range(8_000_000_000, 8_000_001_000))
        requests = [
            http("/tabung", no, f"{n:06}") for n, no in enumerate([*self.accounts, *unknown])
        ]
        guessing = load._replace(requests=requests, statuses=(b"401", b"503"))
        return {
            "no-op, 64": partial(self.measure, load._replace(port=self.noop.port)),
            "tabung, 64": partial(self.measure, load),
            "hot account, 64": partial(self.measure, load._replace(requests=deposits[:1])),
            "plain, 64": partial(self.measure, plain),
            "plain, 1": partial(self.measure, plain._replace(connections=1)),
            "tabung, 1": partial(self.measure, load._replace(connections=1)),
            "replicas, 2 x 32": partial(self.replicas, load),
            "beside guessing, 64": partial(self.measure, load, guessing),
            "beside reading, 64": partial(self.measure, load, reading),
            "first, 8": partial(self.first, customers=30 * CORES, connections=8),
            "bcrypt, all cores": bcrypts,
            "first, 1": partial(self.first, customers=8, connections=1),
            "200 to row": partial(self.booked, load._replace(requests=deposits[:1])),
            "drain": partial(self.drain, Load(load.port, 50 * deposits, 64)),
        }

    def run(self, name: str, load: Callable[[], Figure]) -> None:
        """Measure a load and keep its figure if the audit finds no difference."""
        figure = load()
        if differences := self.sql(AUDIT):
            raise RuntimeError(f"audit after {name}: {differences[:3]}")
        self.figures[name].append(figure)
        texts = (f"{value:.4g} {column}" for column, value in figure.items())
        print(f"{name}:", *texts, sep="  ", file=sys.stderr)

    def report(self) -> None:
        print(platform.platform(), f"{CORES} cores, Python {platform.python_version()}")
        print(f"{'row':41} {'median':>10} {'least':>10} {'most':>10}")
        for row, column, *loads in ROWS:
            columns = ([one[column] for one in self.figures[load]] for load in loads)
            pairs = zip(*columns, strict=False)
            if values := [mine / (other[0] if other else 1) for mine, *other in pairs]:
                texts = (f"{value:10.3g}" for value in (median(values), min(values), max(values)))
                print(f"{row:41}", *texts)


def cpu_seconds(server: Server) -> float:
    """Return the CPU seconds of a server and of its children, ended ones too."""
    process = psutil.Process(server.pid)
    return sum(sum(one.cpu_times()[:4]) for one in (process, *process.children(recursive=True)))


def bcrypts() -> Figure:
    """Compare hashes on all cores."""
    began, hashes = time.monotonic(), 30 * CORES
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(bcrypt.checkpw, hashes * [PIN.encode()], hashes * [PIN_HASH.encode()]))
    return {"per second": hashes / (time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser("python -m dev.bench", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=int, default=2, help="of each load (default: %(default)s)")
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--only", nargs="+", default=[""], metavar="LOAD", help="those whose names begin so")
    options = parser.parse_args()
    with ExitStack() as stack:
        bench = Bench(stack)
        loads = bench.loads(options.seconds)
        chosen = [name for name in loads if name.startswith(tuple(options.only))]
        needs_replica = "replicas, 2 x 32" in chosen
        for service in (bench.transaksi, bench.replica)[: 1 + needs_replica]:
            warm = Load(service.port, [http("/tabung", no) for no in bench.accounts], 8)
            bench.run("first requests of 1,000 customers", partial(bench.measure, warm))
        for name in options.rounds * chosen:
            bench.run(name, loads[name])
        bench.report()


if __name__ == "__main__":
    main()
