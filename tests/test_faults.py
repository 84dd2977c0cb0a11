"""Faults in real processes and real servers, most of them under load.

The fixture `bank` ends each test with `Bank.check`: every answer was true, no key has moved money
twice, the journal has no gap, and in the end balances, journal and mutation book agree.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import choice, randint, sample
from signal import SIGINT, SIGKILL, SIGQUIT
from threading import Event
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest

from dev.local import Server, Service
from tests.support import PIN, Servers, eventually, log_lines, new_servers

KINDS = ("tabung", "tarik")
STREAM, DEAD_LETTER = "mutasi", "mutasi:dead-letter"
PATIENT = ("--resend-after", "1", "--request-timeout", "10")
WAITING = "pg_stat_activity WHERE wait_event_type = 'Lock' OR wait_event = 'PgSleep'"
END_WAITING = f"SELECT pg_terminate_backend(pid, 5000) FROM {WAITING}"  # returns when it has ended
GAPS = """SELECT id FROM (SELECT id, saldo_akhir,
    sum(CASE jenis_transaksi WHEN 'tabung' THEN nominal ELSE -nominal END)
    OVER (PARTITION BY no_rekening ORDER BY id) AS saldo FROM transaksi) _ WHERE saldo <> saldo_akhir"""


@dataclass(eq=False)
class Request:
    """A movement asked for once, and the answer; `status` stays None where none came."""

    no_rekening: str
    jenis: str = "tabung"
    nominal: int = 1
    key: str = field(default_factory=lambda: uuid4().hex)
    status: int | None = None
    saldo: int | None = None
    unknown: bool = True  # whether the client cannot tell if money has moved
    took: float = 0

    def send(self, client: httpx.Client) -> bool:
        """Send it once; false if nobody listens."""
        payload = {"no_rekening": self.no_rekening, "nominal": self.nominal}
        auth, headers = (self.no_rekening, PIN), {"Idempotency-Key": self.key}
        began = time.monotonic()
        try:
            answer = client.post(f"/{self.jenis}", json=payload, auth=auth, headers=headers)
            self.status, self.saldo = answer.status_code, answer.json().get("saldo")
            self.unknown = self.status == 503 and "Retry-After" not in answer.headers
        except httpx.ConnectError:
            return False
        except httpx.TransportError:
            pass  # no answer, or a part of one
        self.took = time.monotonic() - began
        return True


class Load(AbstractContextManager["Load"]):
    """Sends requests over connections spread over the urls until `with` ends, one each at least."""

    def __init__(self, requests: Iterable[Request], urls: list[str], connections: int) -> None:
        self.sent: list[Request] = []  # in the order of their answers
        self._requests, self._stopping = iter(requests), Event()
        self._pool = ThreadPoolExecutor(connections)
        self._work = self._pool.map(self._keep_busy, (urls * connections)[:connections])

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        list(self._work)  # raises what a thread has raised
        self._pool.shutdown()

    def statuses(self) -> Counter[int | None]:
        return Counter(r.status for r in list(self.sent))

    def wait(self, more: int = 100, status: int = 200) -> None:
        """Return when so many more requests were answered with this status."""
        wanted = self.statuses()[status] + more
        eventually(lambda: self.statuses()[status] >= wanted, 60)

    def _keep_busy(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=40, verify=False) as client:
            for r in self._requests:  # which threads share: no generator
                while not (sent := r.send(client)) and not self._stopping.wait(0.05):
                    pass
                if sent:
                    self.sent.append(r)
                if self._stopping.is_set():
                    break


class Bank:
    """Services on servers of their own, which tests may stop and kill."""

    def __init__(self, servers: Servers) -> None:
        self.service, self.sql, self.redis = servers.service, servers.database, servers.redis
        self.stream: Any = servers.stream  # untyped, as its answers are
        self.transaksi, self.mutasi = self.service("transaksi", *PATIENT), self.service("mutasi")
        self.accounts = [self.sql.open_account(1_000_000_000) for _ in range(4)]
        self.loads: list[Load] = []  # of the running test

    def repair(self) -> None:
        """Start what does not run."""
        for server in (self.sql.server, self.redis, self.mutasi, self.transaksi):
            if not server.running:
                server.start()

    def load(
        self, *services: Service, requests: Sequence[Request] = (), connections: int = 16
    ) -> Load:
        """Send these at once, each on a connection of its own; without any, endless ones."""
        endless = iter(
            lambda: Request(choice(self.accounts), choice(KINDS), randint(1, 1000)), None
        )
        urls = [service.url for service in services or [self.transaksi]]
        self.loads.append(Load(requests or endless, urls, len(requests) or connections))
        return self.loads[-1]

    def send(self, requests: Sequence[Request], *services: Service) -> set[int | None]:
        with self.load(*services, requests=requests) as load:
            pass
        return set(load.statuses())

    def deposits(self, count: int) -> list[Request]:
        return [Request(self.accounts[0]) for _ in range(count)]

    @contextmanager
    def queued(self, requests: Sequence[Request], *services: Service) -> Iterator[Load]:
        """Send these while the first account is locked; the block begins when they wait."""
        with self.sql.holding(
            "SELECT FROM rekening WHERE no_rekening = %s FOR UPDATE", self.accounts[0]
        ):
            load = self.load(*services, requests=requests)
            eventually(lambda: self.sql(f"SELECT 1 FROM {WAITING}"))
            for service in (
                services or (self.transaksi,)
            ) * 20:  # so that its event loop goes round
                get(service, "/openapi.json")
            yield load
        with load:
            pass

    def journal(self) -> dict[str, tuple[Any, ...]]:
        columns = "idempotency_key, no_rekening, jenis_transaksi, nominal, saldo_akhir"
        return {key: tuple(row) for key, *row in self.sql(f"SELECT {columns} FROM transaksi")}

    def check(self) -> None:
        """All answers are true, those of unknown outcome may be repeated, and the books agree."""
        self.repair()
        # The transaction of a killed client may still be ending.
        eventually(lambda: not self.sql("SELECT 1 FROM pg_stat_activity WHERE state ~ '^idle in'"))
        sent = [r for load in self.loads for r in load.sent]
        again = [Request(r.no_rekening, r.jenis, r.nominal, r.key) for r in sent if r.unknown]
        assert not again or self.send(again) == {200}
        journal = self.journal()
        for r in (*sent, *again):
            told = (r.no_rekening, r.jenis, r.nominal, r.saldo) if r.status == 200 else None
            assert r.unknown or journal.get(r.key) == told, r
        self.sql.audit()
        eventually(lambda: self.stream.xlen(STREAM) == 0)
        assert self.sql(GAPS) == []


@pytest.fixture(scope="module")
def shared() -> Iterator[Bank]:
    with new_servers() as servers:
        yield (bank := Bank(servers))
        assert {bank.transaksi.stop(timeout=8), bank.mutasi.stop(timeout=8)} == {0}
        assert "deadlock detected" not in servers.postgres.log.read_text()


@pytest.fixture
def bank(shared: Bank) -> Iterator[Bank]:
    shared.loads.clear()
    shared.repair()
    shared.stream.flushall()
    for service in (shared.mutasi, shared.transaksi):
        service.log_start = service.log.stat().st_size  # `log_lines` begins here
    yield shared
    shared.check()


def get(service: Service, path: str, account: str = "") -> httpx.Response:
    return httpx.get(service.url + path, auth=(account, PIN), timeout=30, verify=False)


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


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)])
def test_what_redis_loses_is_sent_again_and_no_plan_reads_a_whole_table(
    bank: Bank, times: int
) -> None:
    """The first test: a plan made while the tables are small must not read the whole of them."""
    trim = partial(bank.stream.xtrim, STREAM, maxlen=10, approximate=False)
    wipe = partial(
        shutil.rmtree, bank.redis.directory / "appendonlydir"
    )  # as if its volume were lost
    bank.sql.audit()
    bank.sql("ANALYZE")
    # Our own sessions scan tables; they have been counted when the session is gone.
    ours = "SELECT 1 FROM pg_stat_activity WHERE usename = 'postgres' AND pid <> pg_backend_pid()"
    eventually(lambda: not bank.sql(f"{ours} AND backend_type = 'client backend'"))
    counters = """SELECT sum(seq_scan), sum(n_tup_ins) FILTER (WHERE relname = 'mutasi') > 400
        AND sum(n_tup_upd) FILTER (WHERE relname = 'outbox') > 100 FROM pg_stat_user_tables"""
    ((scans, _),) = bank.sql(counters)
    with bank.load() as load:
        for lose in (bank.stream.flushall, trim, wipe) * times:
            with hung(bank.mutasi):
                load.wait()
                eventually(lambda: bank.stream.xlen(STREAM) > 60)
                bank.stream.xdel(
                    STREAM, *[entry for entry, _ in bank.stream.xrevrange(STREAM, count=10)]
                )
                lose()
                bank.redis.stop(SIGKILL)
                bank.redis.start()
        eventually(lambda: bank.sql(counters)[0][1])
    assert (set(load.statuses()), bank.sql(counters)[0][0]) == ({200}, scans)
    assert log_lines(bank.transaksi, "movements sent from the outbox")


def test_two_instances_serve_64_clients_and_stop_in_good_order_under_load(bank: Bank) -> None:
    workers = bank.service("transaksi", "--workers", "2", *PATIENT)
    with workers, bank.service("mutasi", "--batch-size", "7"):
        with bank.load(bank.transaksi, workers, connections=64) as load:
            load.wait(1500)
            assert [bank.transaksi.stop(timeout=8), workers.stop(timeout=8)] == [0, 0]
        assert load.statuses().keys() <= {200, None}
        assert bank.journal().keys().isdisjoint(r.key for r in load.sent if r.unknown)


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.long)])
def test_kill_9_loses_nothing_and_moves_nothing_twice(bank: Bank, rounds: int) -> None:
    inserting = "SELECT 1 FROM pg_locks WHERE relation = 'mutasi'::regclass AND NOT granted"
    for _ in range(rounds):
        with bank.service("mutasi", "--batch-size", "7") as second, bank.load() as load:
            load.wait()
            with bank.sql.holding("LOCK TABLE mutasi IN EXCLUSIVE MODE"):
                eventually(lambda: len(bank.sql(inserting)) == 2)
                second.stop(SIGKILL)
                bank.mutasi.stop(SIGKILL)
            bank.transaksi.stop(SIGKILL)
            bank.repair()
            load.wait()
            bank.redis.stop(SIGKILL)
            load.wait(randint(20, 100))  # which are in the outbox only
            bank.transaksi.stop(SIGKILL)
            bank.mutasi.stop(SIGKILL)
        assert load.statuses().keys() == {200, None}
        assert bank.sql("SELECT 1 FROM outbox")
        bank.check()
        assert bank.stream.xlen(DEAD_LETTER) == 0


def test_a_full_queue_refuses_the_surplus_and_sigterm_answers_what_was_accepted(bank: Bank) -> None:
    with (
        bank.service("transaksi", "--max-queue", "5", *PATIENT) as full,
        ThreadPoolExecutor() as pool,
    ):
        get(full, "/saldo", bank.accounts[0])  # so that the PIN is known
        with bank.queued(bank.deposits(60), full) as load:
            eventually(lambda: len(load.sent) >= 30)
            stopping = pool.submit(full.stop, timeout=8)
            with pytest.raises(httpx.TransportError):  # new connections are refused
                eventually(lambda: not get(full, "/openapi.json"))
            assert load.statuses().keys() == {503}
        assert stopping.result() == 0
    assert load.statuses()[200] == 60 - load.statuses()[503] >= 5
    assert not any(r.unknown for r in load.sent)


def test_a_refused_movement_fails_alone_and_an_unexpected_error_is_answered_as_unknown(
    bank: Bank,
) -> None:
    bank.sql("ALTER TABLE transaksi ADD CONSTRAINT bad CHECK (nominal <> 666) NOT VALID")
    requests = [Request(bank.accounts[n % 4], nominal=666 - n % 15) for n in range(30)]
    with bank.queued(requests):  # so that they make one batch
        pass
    refused = [(r.nominal, r.status, r.unknown) for r in requests if r.status != 200]
    assert refused == [(666, 503, False)] * 2
    refusals = eventually(lambda: log_lines(bank.transaksi, "request refused"))
    assert all("CheckViolation 23514 bad" in line["reason"] for line in refusals)
    bank.sql("""ALTER TABLE transaksi DROP CONSTRAINT bad;
        CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER skip BEFORE INSERT ON transaksi FOR EACH ROW EXECUTE FUNCTION skip()""")
    bank.send(lost := bank.deposits(1))
    bank.sql("DROP TRIGGER skip ON transaksi")
    assert (lost[0].status, lost[0].unknown, lost[0].key in bank.journal()) == (503, True, False)
    (line,) = eventually(lambda: log_lines(bank.transaksi, "unexpected error"))
    assert (line["level"], "transaksi/teller.py" in line["exception"]) == ("ERROR", True)
    assert bank.send(bank.deposits(1)) == {200}  # the process goes on


def test_postgresql_restarted_or_its_sessions_terminated_harms_nobody(bank: Bank) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):  # the first time fills the connection pools
            bank.sql.server.start()  # stops it first; then nobody meets a stale connection
            new = [bank.sql.open_account() for _ in range(8)]
            reads = pool.map(
                lambda account: get(bank.transaksi, "/saldo", account).status_code, new
            )
            assert bank.send([Request(account) for account in new]) | {*reads} == {200}
    with bank.load() as load:
        for signal in (SIGQUIT, SIGINT):  # a crash and a fast shutdown
            load.wait()
            bank.sql.server.stop(signal)
            load.wait(32, 503)
            away = [
                get(bank.transaksi, p, bank.accounts[0]) for p in ("/health", "/saldo", "/mutasi")
            ]
            assert {(a.status_code, a.headers["Retry-After"]) for a in away} == {(503, "1")}
            bank.sql.server.start()
        for role in ("transaksi", "mutasi") * 3:
            load.wait(20)
            bank.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", role
            )
        load.wait(20)
    assert load.statuses().keys() == {200, 503}


def test_a_connection_that_breaks_is_retried_once_before_commit_and_unknown_at_commit(
    bank: Bank,
) -> None:
    once, twice, late = deposits = bank.deposits(3)
    for deposit, breaks in ((once, 1), (twice, 2)):
        with bank.queued([deposit]):
            for _ in range(breaks):
                eventually(lambda: bank.sql(END_WAITING))
    bank.sql("""
        CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); END';
        CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON transaksi INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION linger()""")
    with bank.load(requests=[late]):
        eventually(lambda: bank.sql(END_WAITING))
    bank.sql("DROP TRIGGER linger ON transaksi")
    assert [(r.status, r.unknown) for r in deposits] == [(200, False), (503, False), (503, True)]
    assert late.took < 5  # tried again, it would linger until the request's time limit


def test_while_mutasi_is_away_the_stream_stays_short_and_the_outbox_is_watched(bank: Bank) -> None:
    clock = "ALTER TABLE transaksi ALTER tanggal_transaksi SET DEFAULT clock_timestamp()"
    with bank.service("transaksi", "--max-stream", "100", "--resend-after", "1") as transaksi:
        with hung(bank.mutasi):
            bank.sql(f"{clock} - interval '7 s'")
            bank.send(bank.deposits(1), transaksi)
            bank.sql(clock)
            eventually(lambda: log_lines(transaksi, "outbox is behind"))
            with bank.load(transaksi) as load:
                load.wait(600)
            assert load.statuses().keys() == {200}
            length = bank.stream.xlen(STREAM)
            assert 100 <= length < 400  # the limit and a batch
            eventually(lambda: log_lines(transaksi, "outbox is behind")[-1]["level"] == "ERROR")
            ids = {fields[b"id_transaksi"] for _, fields in bank.stream.xrange(STREAM)}
            assert len(ids) == bank.stream.xlen(STREAM) == length  # what is late is not sent again
        eventually(lambda: log_lines(transaksi, "outbox has caught up"))
    told = [line["level"] for line in log_lines(transaksi, "outbox .*")]
    assert told in (["WARNING", "ERROR", "INFO"], ["WARNING", "ERROR", "WARNING", "INFO"])


def test_postgresql_that_hangs_delays_no_answer_and_no_exit(bank: Bank) -> None:
    new, pool = bank.sql.open_account(), ThreadPoolExecutor()
    quick = bank.service("transaksi", "--request-timeout", "2", "--resend-after", "1")
    with pool, quick, bank.load(quick) as load:
        load.wait()
        with hung(bank.sql.server):
            checking = pool.submit(get, quick, "/saldo", new)  # checks the PIN
            assert get(quick, "/health").status_code == 503
            load.wait(2 * 16, 503)
            assert checking.result().headers["Retry-After"] == "1"
        load.wait()
        with hung(bank.sql.server):
            assert quick.stop(timeout=8) == 0
    assert {(r.status, r.unknown) for r in load.sent} >= {(200, False), (503, False), (503, True)}
    assert max(r.took for r in load.sent) < 2 + 3


def test_redis_away_or_hung_fails_no_movement(bank: Bank) -> None:
    def failed(error: str) -> bool:
        """Whether the last failure that each service has logged is this error."""
        sending = log_lines(bank.transaksi, "sending to the stream failed")
        storing = log_lines(bank.mutasi, "processing failed")
        last = [f"{line['level']} {line['exception']}" for line in sending[-1:] + storing[-1:]]
        return len(last) == 2 and all(text.startswith(f"ERROR {error}: ") for text in last)

    with bank.load() as load:
        bank.redis.stop(SIGKILL)
        eventually(partial(failed, "ConnectionError"))
        load.wait()
        bank.redis.start()
        with hung(bank.redis):
            eventually(partial(failed, "TimeoutError"))
            load.wait()
    assert load.statuses().keys() == {200}


def test_movements_that_waited_in_memory_for_long_are_sent_once(bank: Bank) -> None:
    bank.sql.audit()  # nothing is waiting
    old = "SELECT 1 FROM outbox WHERE dikirim_pada < clock_timestamp() - interval '2200 ms'"
    with hung(bank.mutasi):
        with hung(bank.redis):
            for count in (1, 19):  # which wait while the first is tried
                bank.send(bank.deposits(count))
            eventually(lambda: bank.sql(old))
        eventually(lambda: bank.stream.xlen(STREAM) >= 20)
        bank.send(bank.deposits(1))  # behind them
        eventually(lambda: bank.stream.xlen(STREAM) > 20)
        assert bank.stream.xlen(STREAM) == 21


def test_redis_full_or_with_ids_ahead_of_the_clock_loses_nothing_and_causes_no_loop(
    bank: Bank,
) -> None:
    with hung(bank.mutasi):
        bad = bank.stream.xadd(STREAM, {"nominal": "bad"}, id="9999999999999-0")
        began = time.monotonic()
        bank.send(bank.deposits(20))
        eventually(lambda: bank.stream.xlen(STREAM) >= 1 + 3 * 20)
        assert time.monotonic() - began > 2 * 2  # each movement again once in 2R
        bank.stream.config_set("maxmemory", 1)
    # What is stored makes room, although the bad entry cannot be set aside.
    eventually(lambda: [entry for entry, _ in bank.stream.xrange(STREAM)] == [bad])
    assert bank.send(bank.deposits(20)) == {200}
    # Sending again is committed before it is tried: a failure means again after 2R.
    tried = """SELECT 1 FROM outbox JOIN transaksi ON id = id_transaksi
        WHERE dikirim_pada > tanggal_transaksi + interval '1500 ms'"""
    eventually(lambda: bank.sql(tried))
    bank.stream.config_set("maxmemory", 0)
    eventually(lambda: bank.stream.xlen(DEAD_LETTER) == 1)


def test_what_an_operator_can_mend_is_no_poison(bank: Bank) -> None:
    bank.sql("REVOKE INSERT ON mutasi FROM mutasi")
    bank.send(bank.deposits(10))
    eventually(lambda: len(log_lines(bank.mutasi, "processing failed")) >= 2)  # it is retried
    assert (
        log_lines(bank.mutasi, "processing failed")[0]["exception"] == "InsufficientPrivilege 42501"
    )
    bank.stream.xadd(STREAM, bank.stream.xrange(STREAM)[0][1])  # a movement twice in a batch
    bank.stream.acl_setuser("default", enabled=True, commands=["-xdel"])
    bank.sql("GRANT INSERT ON mutasi TO mutasi")
    bank.sql.audit()  # what was stored but not deleted comes again
    eventually(lambda: log_lines(bank.mutasi, "duplicate messages ignored"))
    assert len(log_lines(bank.mutasi, "mutation stored")) == 10
    bank.stream.acl_setuser("default", enabled=True, commands=["+xdel"])
    assert bank.stream.xlen(DEAD_LETTER) == 0


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_bad_and_forged_messages_are_set_aside_and_the_true_ones_booked(
    bank: Bank, count: int
) -> None:
    wrong: dict[str, dict[str, bytes]] = {  # by the reason: fields, each with values for it
        "InvalidTextRepresentation": {
            "nominal": b"|\xd9\xa1\xd9\xa2|5.0",
            "id_transaksi": b"x",
            "jenis_transaksi": b"setor|Tarik|\xff",
        },
        "NumericValueOutOfRange": {
            "nominal": b"7" * 1_000_000,
            "id_transaksi": b"9999999999999999999",
        },
        "UntranslatableCharacter": {"id_transaksi": b"\x00", "traceparent": b"\x00"},
        "InvalidTimeZoneDisplacementValue": {"tanggal_transaksi": b"2026-01-31T00:00:00+99:99"},
        "DatetimeFieldOverflow": {"tanggal_transaksi": b"2026-02-30T00:00:00+07:00"},
        "ForeignKeyViolation": {
            "tanggal_transaksi": b"2026-01-31T00:00:00+07:00|now|infinity",
            "no_rekening": b"1234567890|123|\xff\xfe34567890|1234567890\n|" + b"1" * 1_000_000,
            "jenis_transaksi": b"tarik",
            "nominal": b"999999|-5",
        },
    }
    bank.sql.audit()  # nothing is waiting
    with hung(bank.mutasi):
        with bank.load() as load:
            load.wait(count)
        bank.send(bank.deposits(1))
        unbooked = bank.sql("SELECT id_transaksi FROM outbox")
        eventually(lambda: bank.stream.xlen(STREAM) == len(unbooked), 2)  # without being sent again
        *true, last = [fields for _, fields in bank.stream.xrange(STREAM)]  # the last one gets lost
        to_come = last | {b"id_transaksi": b"%d" % (max(unbooked)[0] + 1)}
        bad = [({b"id_transaksi": b"1"}, "NotNullViolation"), (to_come, "ForeignKeyViolation")]
        odd = [
            true[1] | {b"f%d" % n: b"\xff" for n in range(1000)},
            true[2] | {b"": b"", b"\xff": b"\x00"},
        ]
        odd += [message | {b"traceparent": b"\xff" * 100_000} for message in true[3:5]]
        for reason, fields in wrong.items():
            for name, values in fields.items():
                variants = [last | {name.encode("latin-1"): value} for value in values.split(b"|")]
                bad += [(variant, reason) for variant in variants]
        messages = [*true, true[0], *odd, *(message for message, _ in bad)]
        with bank.stream.pipeline() as pipe:
            pipe.delete(STREAM)
            for message in sample(messages, len(messages)):
                pipe.xadd(STREAM, message)
            pipe.execute()
    bank.sql.audit(60)
    bank.send(bank.deposits(1))
    bank.sql.audit()
    bank.stream.xadd(STREAM, bad[-1][0])  # once more, after the true one
    eventually(lambda: bank.stream.xlen(DEAD_LETTER) == len(bad) + 1)
    letters = [fields for _, fields in bank.stream.xrange(DEAD_LETTER)]
    for message, reason in bad:
        of_it = [letter for letter in letters if reason.encode() in letter[b"reason"]]
        assert any(letter.items() >= message.items() for letter in of_it), reason
