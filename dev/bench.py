"""Measure throughput, latency and CPU per request on servers of its own: `python -m dev.bench`.

A connection sends its next request when it has the answer to the last; only "200 to row" is
paced, at half the rate of "tabung, 64". The loads take turns, and ratios are taken within a round.
Only a customer's first request costs a bcrypt. The run ends with exit status 1 if after a load
not all movements get booked, or the audit finds a difference.
"""

import argparse
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
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
from redis import Redis as RedisClient

from dev.generator import Figure, Load, http, measure, percentiles, send
from dev.local import PIN, PIN_HASH, Postgres, Redis, Service

CORES = os.cpu_count() or 1
# The plain way books nothing: its accounts begin with 7.
AUDIT = """SELECT no_rekening FROM audit_saldo
WHERE selisih_transaksi <> 0 OR selisih_mutasi <> 0 AND no_rekening < '7'"""
# A subquery, because without statistics the plan of a join reads the whole journal.
BOOKED = """SELECT id_transaksi, (SELECT saldo_akhir FROM transaksi WHERE id = id_transaksi)
FROM mutasi WHERE id_transaksi > %s ORDER BY id_transaksi"""

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
    ("CPU of transaksi per tabung, us", "transaksi us", "tabung, 64"),
    ("CPU of mutasi per tabung, us", "mutasi us", "tabung, 64"),
    ("CPU of no-op per request, us", "transaksi us", "no-op, 64"),
    ("two replicas / one", "per second", "replicas, 2 x 32", "tabung, 64"),
)


class Bench:
    """The servers, services and accounts of a run, and what was measured on them."""

    def __init__(self, stack: ExitStack) -> None:
        self.figures: dict[str, list[Figure]] = defaultdict(list)
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="tabungan-bench-")))
        self.postgres, self.redis = pair = Postgres(directory), Redis(directory)
        self.mutasi = Service("mutasi", *pair, directory=directory)
        cached = ("transaksi", *pair, "--auth-cache-ttl", "3600")
        self.transaksi, self.replica = (Service(*cached, directory=directory) for _ in range(2))
        python = (sys.executable, "-m", "dev.references")
        url = {"DB_URL": self.postgres.url("transaksi").replace(":", "+psycopg2:", 1)}
        self.references = Service(
            "transaksi", *pair, directory=directory, python=python, environment=url
        )
        self.servers = (*pair, self.mutasi, self.transaksi, self.replica, self.references)
        for server in self.servers:
            stack.enter_context(server)
        self.generators = stack.enter_context(ProcessPoolExecutor(2, get_context("spawn")))
        self.stream = RedisClient(port=self.redis.port, password=self.redis.password)
        self.db = psycopg2.connect(self.postgres.url())
        self.db.autocommit = True
        self.numbers = count()
        self.accounts = self.new_accounts(1000)

    def sql(self, query: str, *parameters: Any) -> list[Any]:
        with self.db.cursor() as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def new_accounts(self, number: int, first_digit: int = 6) -> list[str]:
        accounts = [f"{first_digit}{next(self.numbers):09}" for _ in range(number)]
        self.sql("SELECT buka_rekening(no, 'N', %s, 0) FROM unnest(%s) no", PIN_HASH, accounts)
        return accounts

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of the servers of each name, and of their children."""
        seconds: dict[str, float] = defaultdict(float)
        for server in self.servers:
            process = psutil.Process(server.pid)
            for one in (process, *process.children(recursive=True)):
                seconds[server.name] += sum(one.cpu_times()[:4])  # ended children too
        return seconds

    def all_booked(self) -> bool:
        return not self.stream.xlen("mutasi") and not self.sql("SELECT 1 FROM outbox LIMIT 1")

    def wait(self, is_done: Callable[[], bool]) -> float:
        began = time.monotonic()
        while not is_done():
            assert time.monotonic() < began + 120, "not all movements were sent or booked"
            time.sleep(0.02)
        return time.monotonic() - began

    def measure(self, *loads: Load) -> Figure:
        """Send loads at once. Returns the figure of the first, with the CPU per request."""
        self.sql("CHECKPOINT")
        before = self.cpu_seconds()
        figure, *_ = self.generators.map(measure, loads)
        self.wait(self.all_booked)
        for name, seconds in self.cpu_seconds().items():
            figure[f"{name} us"] = (seconds - before[name]) / figure["count"] * 1e6
        return figure

    def booked(self, load: Load) -> Figure:
        """Time each movement, known by its balance, from its 200 to its row in mutasi."""
        rates = [figure["per second"] for figure in self.figures["tabung, 64"]]
        ((last,),) = self.sql("SELECT max(id_transaksi) FROM mutasi")
        job = self.generators.submit(send, load._replace(rate=median(rates or [1000]) / 2))
        seen: dict[int, float] = {}
        while not (job.done() and self.all_booked() and not self.sql(BOOKED, last)):
            for id_transaksi, saldo in self.sql(BOOKED, last):
                last, seen[saldo] = id_transaksi, time.monotonic()
            time.sleep(0.003)
        answers = {int(text.rpartition(b":")[2][:-1]): came for text, _, came in job.result()}
        return percentiles(seen[saldo] - came for saldo, came in answers.items())

    def drain(self, load: Load) -> Figure:
        """Measure how fast mutasi books movements that were accepted while it was paused."""
        os.kill(self.mutasi.pid, SIGSTOP)
        self.generators.submit(send, load).result()
        self.wait(lambda: self.stream.xlen("mutasi") >= len(load.requests))
        os.kill(self.mutasi.pid, SIGCONT)
        return {"per second": len(load.requests) / self.wait(self.all_booked)}

    def first(self, service: Service, connections: int, accounts: list[str]) -> Figure:
        requests = [http("/tabung", no) for no in accounts]
        return self.measure(Load([service.port], requests, connections, inf))

    def loads(self) -> dict[str, Callable[[], Figure]]:
        ports, both = [self.transaksi.port], [self.transaksi.port, self.replica.port]
        references = [self.references.port]
        no_op = Load(references, [http("/noop", no) for no in self.accounts])
        plain = Load(references, [http("/plain", no) for no in self.new_accounts(1000, 7)])
        deposits = [http("/tabung", no) for no in self.accounts]
        tabung, hot = Load(ports, deposits), Load(ports, deposits[:1])
        reads = [http(path, no) for no in self.accounts for path in ("/saldo", "/mutasi")]
        unknown = [f"8{n:09}" for n in range(1000)]
        guesses = [http("/tabung", no, pin="000000") for no in (*self.accounts, *unknown)]
        guessing = Load(ports, guesses, statuses=(b"401", b"503"))
        return {
            "no-op, 64": lambda: self.measure(no_op),
            "tabung, 64": lambda: self.measure(tabung),
            "hot account, 64": lambda: self.measure(hot),
            "plain, 64": lambda: self.measure(plain),
            "plain, 1": lambda: self.measure(plain._replace(connections=1)),
            "tabung, 1": lambda: self.measure(tabung._replace(connections=1)),
            "replicas, 2 x 32": lambda: self.measure(tabung._replace(ports=both)),
            "beside guessing, 64": lambda: self.measure(tabung, guessing),
            "beside reading, 64": lambda: self.measure(tabung, Load(ports, reads)),
            "first, 8": lambda: self.first(self.transaksi, 8, self.new_accounts(30 * CORES)),
            "bcrypt, all cores": bcrypts,
            "first, 1": lambda: self.first(self.transaksi, 1, self.new_accounts(8)),
            "200 to row": lambda: self.booked(hot),
            "drain": lambda: self.drain(Load(ports, 50 * deposits, seconds=inf)),
        }

    def report(self) -> None:
        print(platform.platform(), f"{CORES} cores, Python {platform.python_version()}")
        print(f"{'row':41} {'median':>10} {'least':>10} {'most':>10}")
        for row, column, *loads in ROWS:
            columns = ([one[column] for one in self.figures[load]] for load in loads)
            pairs = zip(*columns, strict=False)
            if values := [mine / (other[0] if other else 1) for mine, *other in pairs]:
                texts = (f"{value:10.3g}" for value in (median(values), min(values), max(values)))
                print(f"{row:41}", *texts)


def bcrypts() -> Figure:
    """Compare hashes on all cores."""
    began, hashes = time.monotonic(), 30 * CORES
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(bcrypt.checkpw, hashes * [PIN.encode()], hashes * [PIN_HASH.encode()]))
    return {"per second": hashes / (time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser("python -m dev.bench", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--only", nargs="+", default=[""], metavar="LOAD", help="those whose names begin so")
    options = parser.parse_args()
    with ExitStack() as stack:
        bench = Bench(stack)
        loads = bench.loads()
        chosen = [name for name in loads if name.startswith(tuple(options.only))]
        bench.first(bench.transaksi, 8, bench.accounts)
        if "replicas, 2 x 32" in chosen:
            bench.first(bench.replica, 8, bench.accounts)
        for name in options.rounds * chosen:
            figure = loads[name]()
            if differences := bench.sql(AUDIT):
                raise RuntimeError(f"audit after {name}: {differences[:3]}")
            bench.figures[name].append(figure)
            print(name, {key: f"{value:.4g}" for key, value in figure.items()}, file=sys.stderr)
        bench.report()


if __name__ == "__main__":
    main()
