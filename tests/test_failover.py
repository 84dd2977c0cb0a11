"""PostgreSQL on two machines: the primary dies, and its synchronous standby takes over.

The machines are two loopback addresses. The fixture ends each test with `Bank.check`.
"""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory

import psutil
import pytest

from common.stream import DEAD_LETTERS
from dev.local import HOST, Postgres, Redis
from tests.load import Bank, Request, get
from tests.support import SECRETS, Database, Servers, check_logs, eventually, log_lines, running

HOSTS = (HOST, "127.0.0.2")
TIMEOUT_S = 2
FOLLOWING = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
END_SESSIONS = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE usename IN ('transaksi', 'mutasi')"""


class Machine(Postgres):
    """PostgreSQL on an address of its own, as the primary or as the standby of another."""

    _ready_line = b"database system is ready to accept"  # all connections, or read-only ones

    def __init__(self, directory: Path, host: str, port: int | None = None) -> None:
        super().__init__(directory, port)
        self.host = host
        self.sql = Database(self)

    def url(self, user: str = "postgres") -> str:
        return super().url(user).replace(HOST, self.host)

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the server's user."""
        command = [f"{self._command[3]}/{program}", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **self._options)

    def crash(self) -> None:
        """Kill all processes at once, so that none tells a client or the standby anything."""
        postmaster = psutil.Process(self.pid)
        postmaster.suspend()
        for child in postmaster.children():
            child.kill()
        self.stop(SIGKILL)

    def follow(self, primary: "Machine") -> None:
        """Start as a synchronous standby, with a fresh copy of the primary."""
        self.stop()
        self.password, self.passwords = primary.password, primary.passwords
        shutil.rmtree(self._home / "data", ignore_errors=True)
        self.run("pg_basebackup", "-R", "-D", "data", "-d", primary.url(), "-c", "fast", "-N")
        with (self._home / "data/postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = '{self.host}'\n")
        self.start()
        primary.wait_for("*")
        eventually(lambda: primary.sql(FOLLOWING), 60)

    def wait_for(self, standbys: str) -> None:
        """Have each COMMIT wait for these standbys, or for none."""
        setting = f"ALTER SYSTEM SET synchronous_standby_names = '{standbys}'"
        self.run("psql", "-q", self.url(), "-c", setting, "-c", "SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Become the primary, without a standby."""
        self.run("pg_ctl", "promote", "-D", "data")
        self.wait_for("")


class TwoMachines(Bank):
    """Two instances of each service, on a primary and its standby."""

    def __init__(self, servers: Servers, primary: Machine, standby: Machine) -> None:
        super().__init__(servers)
        self.primary, self.standby = primary, standby
        hosts = ("--db-host", ",".join(HOSTS))
        options = [*hosts, "--request-timeout", str(TIMEOUT_S), "--resend-after", "1"]
        options += ["--auth-cache-ttl", "3600"]
        self.transaksi, self.other = (self.service("transaksi", *options) for _ in range(2))
        self.mutasi, self.other_mutasi = (self.service("mutasi", *hosts) for _ in range(2))
        self.services = [self.transaksi, self.other, self.mutasi, self.other_mutasi]

    def swap(self) -> None:
        """Promote the standby of a primary that is dead."""
        self.primary, self.standby = self.standby, self.primary
        self.primary.promote()
        self.sql = self.primary.sql


@pytest.fixture(scope="module")
def shared() -> Iterator[TwoMachines]:
    try:
        socket.create_server((HOSTS[1], 0)).close()
    except OSError:
        pytest.skip("needs the loopback addresses of Linux")
    with TemporaryDirectory(prefix="tabungan-test-") as name, ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o711)  # run by root, PostgreSQL is another user
        primary = stack.enter_context(Machine(directory / "first", HOSTS[0]))
        standby = Machine(directory / "second", HOSTS[1], primary.port)
        stack.callback(standby.stop)
        redis = stack.enter_context(Redis(directory / "redis"))
        bank = TwoMachines(Servers(directory, primary, redis), primary, standby)
        stack.enter_context(running(*bank.services))
        yield bank
        check_logs(directory, SECRETS)


@pytest.fixture
def bank(shared: TwoMachines) -> Iterator[TwoMachines]:
    shared.loads.clear()
    if not (shared.standby.running and shared.primary.sql(FOLLOWING)):
        shared.standby.follow(shared.primary)
    for service, account in product((shared.transaksi, shared.other), shared.accounts):
        cache_pin = partial(get, service, "/saldo", account)
        eventually(lambda: cache_pin().status_code == 200)  # noqa: B023 - at once
    yield shared
    shared.check()
    assert shared.stream.xlen(DEAD_LETTERS) == 0


def test_failover_and_the_way_back_lose_nothing(bank: TwoMachines) -> None:
    with bank.load(bank.transaksi, bank.other) as load:
        for _ in HOSTS:
            load.wait(200)
            bank.primary.crash()
            eventually(lambda: get(bank.transaksi, "/health").status_code == 503)
            bank.swap()
            load.wait(200)

            bank.standby.follow(bank.primary)
            bank.sql(END_SESSIONS)

        load.wait(200)
    assert load.statuses().keys() == {200, 503}


def test_without_a_standby_requests_end_in_time_and_go_on_later(bank: TwoMachines) -> None:
    with bank.load(bank.transaksi, bank.other) as load:
        # 20 are more than can be under way: some of them wait behind the COMMIT that hangs.
        for go_on, refused in ((bank.standby.start, 20), (lambda: bank.primary.wait_for(""), 1)):
            load.wait(50)
            bank.standby.crash()
            load.wait(refused, 503)
            go_on()
        load.wait(50)
    failed = log_lines(bank.transaksi, "request failed")

    assert load.statuses().keys() == {200, 503}
    assert {request.unknown for request in load.sent if request.status == 503} == {True, False}
    assert max(line["duration_ms"] for line in failed) < (TIMEOUT_S + 8) * 1000


def test_a_replayed_answer_is_as_durable_as_the_first(bank: TwoMachines) -> None:
    """A COMMIT hangs, and the primary restarts and dies before the standby has the movement."""
    bank.standby.crash()
    deposits = bank.deposits(4)
    assert bank.send(deposits) == {503}
    bank.primary.crash()
    bank.primary.start()
    committed = next(request.key for request in deposits if request.key in bank.journal())

    repeated = Request(bank.accounts[0], key=committed)
    assert bank.send([repeated]) == {503}
    assert repeated.unknown  # it waited in COMMIT, too

    bank.primary.crash()
    bank.standby.start()
    bank.swap()
    assert committed not in bank.journal()
