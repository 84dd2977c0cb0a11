"""Faults in real processes and real servers, most of them under load.

The fixture `bank` ends each test with `Bank.check`: every answer was true, no key has moved money
twice, the journal has no gap, and in the end balances, journal and mutation book agree.
"""

import random
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from signal import SIGINT, SIGKILL, SIGQUIT
from typing import Any

import httpx
import psutil
import pytest

from conftest import PIN, Servers, eventually, log_lines, new_servers
from dev.local import Server, Service
from tests.load import Load, Request, mixed, request
from transaksi.app import MAX_NOMINAL

STREAM, DEAD_LETTER = "mutasi", "mutasi:dead-letter"
PATIENT = ("--resend-after", "1", "--request-timeout", "10")
LOCK = "SELECT 1 FROM rekening WHERE no_rekening = %s FOR UPDATE"
LOCK_WAITS = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
GAPS = """SELECT id FROM (SELECT id, saldo_akhir,
    sum(CASE jenis_transaksi WHEN 'tabung' THEN nominal ELSE -nominal END)
    OVER (PARTITION BY no_rekening ORDER BY id) AS saldo FROM transaksi) _ WHERE saldo <> saldo_akhir"""
Message = dict[bytes, bytes]


class Bank:
    """A transaksi and a mutasi, which tests may stop and kill, on servers of their own."""

    def __init__(self, servers: Servers) -> None:
        self.servers, self.sql, self.redis = servers, servers.database, servers.redis
        self.stream: Any = servers.stream  # untyped, as its answers are
        self.transaksi = servers.service("transaksi", *PATIENT)
        self.mutasi = servers.service("mutasi")
        self.accounts = [self.sql.open_account(1_000_000_000) for _ in range(4)]

    def repair(self) -> None:
        for server in (self.sql.server, self.redis, self.mutasi, self.transaksi):
            if not server.running:
                server.start()

    def begin(self) -> None:
        """Start what does not run; `log_lines` returns what is logged from now on."""
        self.loads: list[Load] = []
        self.others: list[Service] = []
        self.repair()
        self.stream.flushall()
        for service in (self.mutasi, self.transaksi):
            service.log_start = service.log.stat().st_size

    def start(self, name: str, *arguments: str) -> Service:
        """Start another service, which runs until the end of the test."""
        self.others.append(self.servers.service(name, *arguments))
        self.others[-1].start()
        return self.others[-1]

    def load(self, requests: Iterable[Request] = (), *services: Service, connections: int = 16) -> Load:
        urls = [service.url for service in services or [self.transaksi]]
        self.loads.append(Load(requests or mixed(self.accounts), *urls, connections=connections))
        return self.loads[-1]

    def send(self, requests: Sequence[Request]) -> set[int | None]:
        """Send these at once, each on a connection of its own; return the statuses."""
        with self.load(requests, connections=len(requests)) as load:
            load.join(timeout=60)
        return load.statuses()

    def deposits(self, count: int, **fields: Any) -> list[Request]:
        return [request(**{"no_rekening": self.accounts[0]} | fields) for _ in range(count)]

    @contextmanager
    def queued(self, load: Load, *services: Service) -> Iterator[None]:
        """Run a load while its first account is locked; the block begins when the requests wait."""
        with self.sql.holding(LOCK, self.accounts[0]):
            load.start()
            eventually(lambda: self.sql(LOCK_WAITS))
            for service in (services or (self.transaksi,)) * 20:  # so that all event loops go round
                get(service, "/openapi.json")
            yield
        load.join(timeout=20)

    def entries(self, key: str = STREAM) -> list[Message]:
        return [fields for _, fields in self.stream.xrange(key)]

    def unbooked(self) -> int:
        query = "SELECT count(*) FROM transaksi WHERE id NOT IN (SELECT id_transaksi FROM mutasi)"
        return int(self.sql(query)[0][0])

    def journal(self, requests: Sequence[Request]) -> set[str]:
        """Check the answers against the journal; return those of their keys that it has."""
        columns = "idempotency_key, no_rekening, jenis_transaksi, nominal, saldo_akhir"
        query = f"SELECT {columns} FROM transaksi WHERE idempotency_key = ANY(%s)"
        found = {key: tuple(row) for key, *row in self.sql(query, [r.key for r in requests])}
        for r in requests:
            if r.status == 200:
                assert found.get(r.key) == (r.no_rekening, r.jenis, r.nominal, r.saldo)
            else:
                assert r.unknown or r.key not in found, r
        return set(found)

    def check(self) -> None:
        """All answers are true, those of unknown outcome may be repeated, and the books agree."""
        self.repair()
        assert {service.stop(timeout=8) for service in self.others if service.running} <= {0}
        # The transaction of a killed client may still be ending.
        idle = "SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in%%'"
        eventually(lambda: not self.sql(idle))
        sent = [r for load in self.loads for r in load.sent]
        journal = self.journal(sent)
        for first in (r for r in sent if r.unknown):
            again = Request(first.no_rekening, first.jenis, first.nominal, first.key)
            assert self.send([again]) == {400 if again.nominal == MAX_NOMINAL else 200}
            assert ("\nidempotent-replayed: true" in again.headers) == (first.key in journal)
            self.journal([again])
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
    shared.begin()
    yield shared
    shared.check()


def get(service: Service, path: str, account: str = "", timeout: float = 30) -> httpx.Response:
    return httpx.get(service.url + path, auth=(account, PIN), timeout=timeout, verify=False)


@contextmanager
def hung(server: Server) -> Iterator[None]:
    """Suspend all processes of a server: its sockets stay open, but nothing answers."""
    processes = [psutil.Process(server.pid)]
    with ExitStack() as stack:
        for process in processes:
            process.suspend()  # the parent first, so that it starts no more children
            stack.callback(process.resume)
            processes += process.children()
        yield


@contextmanager
def away(server: Server) -> Iterator[None]:
    server.stop(SIGKILL)
    yield
    server.start()


def test_no_plan_reads_a_whole_table(bank: Bank) -> None:
    """The first test: a plan made while the tables are small must not read the whole of them."""
    bank.sql.audit()
    bank.sql("ANALYZE")
    # Our own sessions scan tables; they have been counted when the session is gone.
    ours = "SELECT 1 FROM pg_stat_activity WHERE usename = 'postgres' AND pid <> pg_backend_pid()"
    eventually(lambda: not bank.sql(f"{ours} AND backend_type = 'client backend'"))
    counters = """SELECT sum(seq_scan)::int, sum(n_tup_ins)::int,
        (sum(n_tup_upd) FILTER (WHERE relname = 'outbox'))::int FROM pg_stat_user_tables"""
    ((scans, rows, sent_again),) = bank.sql(counters)
    with bank.load() as load:
        with hung(bank.mutasi):
            load.wait()
            bank.stream.flushall()
        eventually(lambda: bank.sql(counters)[0][1] > rows + 2000, 60)
        eventually(lambda: bank.sql(counters)[0][2] > sent_again + 50, 60)
    assert bank.sql(counters)[0][0] == scans


def test_two_instances_serve_64_clients_and_stop_in_good_order_under_load(bank: Bank) -> None:
    both = (bank.transaksi, bank.start("transaksi", "--workers", "2", *PATIENT))
    bank.start("mutasi", "--batch-size", "7")
    deposits = mixed([*bank.accounts[:1] * 4, *bank.accounts])  # the first account is a busy one
    requests = (r for m in deposits for r in (m, request(m.no_rekening, "tarik", MAX_NOMINAL)))
    with ThreadPoolExecutor() as pool, bank.load(requests, *both, connections=64) as load:
        load.wait(1000)
        assert list(pool.map(lambda service: service.stop(timeout=8), both)) == [0, 0]
    assert load.statuses() <= {200, 400, None}
    assert bank.journal(load.sent).isdisjoint(r.key for r in load.sent if r.unknown)


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.long)])
def test_kill_9_loses_nothing_and_moves_nothing_twice(bank: Bank, kills: int) -> None:
    """Every other time both services die while Redis is away: movements are in the outbox only."""
    for n in range(kills):
        with bank.load() as load:
            load.wait()
            if n % 2:
                bank.redis.stop(SIGKILL)
            load.wait(random.randint(20, 100))
            for service in (bank.transaksi, bank.mutasi)[: 1 + n % 2]:
                service.stop(SIGKILL)
        assert None in load.statuses()
        assert n % 2 == 0 or bank.unbooked() > 0
        bank.check()


def test_an_unexpected_error_is_answered_as_unknown_and_the_process_goes_on(bank: Bank) -> None:
    bank.sql("""
        CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER skip BEFORE INSERT ON transaksi FOR EACH ROW EXECUTE FUNCTION skip()""")
    lost = bank.deposits(1)
    bank.send(lost)
    bank.sql("DROP TRIGGER skip ON transaksi")
    assert (lost[0].status, lost[0].unknown, bank.journal(lost)) == (503, True, set())
    (line,) = eventually(lambda: log_lines(bank.transaksi, "unexpected error"))
    assert (line["level"], "transaksi/teller.py" in line["exception"]) == ("ERROR", True)
    assert bank.send(bank.deposits(1)) == {200}


def test_a_full_queue_refuses_the_surplus_and_sigterm_answers_what_was_accepted(bank: Bank) -> None:
    transaksi = bank.start("transaksi", "--max-queue", "5", *PATIENT)
    get(transaksi, "/saldo", bank.accounts[0])  # so that the PIN is known
    load = bank.load(bank.deposits(60), transaksi, connections=60)
    with ThreadPoolExecutor() as pool:
        with bank.queued(load, transaksi):
            eventually(lambda: len(load.sent) >= 30)
            stopping = pool.submit(transaksi.stop, timeout=8)
            with pytest.raises(httpx.TransportError):  # new connections are refused
                eventually(lambda: not get(transaksi, "/openapi.json", timeout=0.5))
            assert load.statuses() == {503}
        assert stopping.result() == 0
    assert load.count(200) == 60 - load.count(503) >= 5
    assert not any(r.unknown for r in load.sent)


def test_a_command_refused_by_the_database_fails_alone(bank: Bank) -> None:
    bank.sql("ALTER TABLE transaksi ADD CONSTRAINT bad CHECK (nominal <> 666) NOT VALID")
    amounts = [666 if n in (5, 20) else n + 1 for n in range(30)]
    requests = [request(bank.accounts[n % 4], nominal=amount) for n, amount in enumerate(amounts)]
    with bank.queued(bank.load(requests, connections=30)):  # so that they make one batch
        pass
    bank.sql("ALTER TABLE transaksi DROP CONSTRAINT bad")
    refused = [(r.nominal, r.status, r.unknown) for r in requests if r.status != 200]
    assert refused == [(666, 503, False)] * 2
    refusals = eventually(lambda: log_lines(bank.transaksi, "request refused"))
    assert all("CheckViolation 23514 bad" in line["reason"] for line in refusals)


def test_postgresql_restarted_or_its_sessions_terminated_under_load(bank: Bank) -> None:
    with bank.load() as load:
        for signal in (SIGINT, SIGQUIT):  # a fast shutdown and a crash
            load.wait()
            refused = load.count(503)
            bank.sql.server.stop(signal)
            eventually(lambda: load.count(503) >= refused + 32)  # noqa: B023 - called at once
            for answer in (get(bank.transaksi, p, bank.accounts[0]) for p in ("/health", "/saldo")):
                assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "1")
            bank.sql.server.start()
            load.wait()
        ours = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY(%s)"
        for _ in range(5):
            bank.sql(ours, ["transaksi", "mutasi"])
            load.wait(20)
    assert load.statuses() == {200, 503}


def test_after_a_restart_of_postgresql_no_customer_meets_a_stale_connection(bank: Bank) -> None:
    def visit(account: str) -> set[int | None]:
        """A first request of each kind: a PIN check, two reads and a deposit."""
        paths = ("/saldo", "/mutasi", "/health")
        reads = {get(bank.transaksi, path, account).status_code for path in paths}
        return reads | bank.send(bank.deposits(1, no_rekening=account))

    accounts = [bank.sql.open_account() for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(visit, accounts[:8])) == [{200}] * 8  # fills the connection pools
        bank.sql.server.stop()
        bank.sql.server.start()
        assert list(pool.map(visit, accounts[8:])) == [{200}] * 8


def test_a_connection_that_breaks_is_retried_once_before_commit_and_unknown_at_commit(bank: Bank) -> None:
    for breaks, status in ((1, 200), (2, 503)):
        (deposit,) = bank.deposits(1)
        with bank.queued(bank.load([deposit])):
            for _ in range(breaks):
                (waiting,) = eventually(lambda: bank.sql(LOCK_WAITS))
                bank.sql("SELECT pg_terminate_backend(%s)", *waiting)
                eventually(lambda: waiting not in bank.sql(LOCK_WAITS))  # noqa: B023
        assert (deposit.status, deposit.unknown) == (status, False)
    bank.sql("""
        CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); END';
        CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON transaksi INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION linger()""")
    with bank.load(bank.deposits(1)) as load:
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        eventually(lambda: bank.sql(end))
        load.join(timeout=5)  # tried again, it would linger until the request's time limit
        answers = [(r.status, r.unknown) for r in load.sent]
        bank.sql("DROP TRIGGER linger ON transaksi")
    assert answers == [(503, True)]


def test_postgresql_that_hangs_delays_no_answer_and_no_exit(bank: Bank) -> None:
    quick = bank.start("transaksi", "--resend-after", "1", "--request-timeout", "2")
    new = [bank.sql.open_account() for _ in range(2)]
    with ThreadPoolExecutor() as pool, bank.load((), quick) as load, bank.load() as other:
        load.wait()
        other.wait()
        with hung(bank.sql.server):
            answers = pool.map(get, (quick, bank.transaksi), ["/saldo"] * 2, new)  # PIN checks
            assert get(quick, "/health").status_code == 503
            assert bank.transaksi.stop(timeout=8) == 0  # with a batch and a PIN check under way
            eventually(lambda: load.count(503) >= 2 * 16)
        load.wait()
        first = next(answers)
    assert (first.status_code, first.headers["Retry-After"]) == (503, "1")
    assert load.statuses() == {200, 503}
    assert {r.unknown for r in load.sent if r.status == 503} == {True, False}
    assert max(r.took for r in load.sent) < 2 + 3


def test_redis_away_or_hung_fails_no_movement(bank: Bank) -> None:
    told = {bank.transaksi: "sending to the stream failed", bank.mutasi: "processing failed"}
    with bank.load() as load:
        for fault, error in ((away, "ConnectionError: "), (hung, "TimeoutError: ")):
            load.wait()
            with fault(bank.redis):
                for item in told.items():
                    eventually(
                        lambda: log_lines(*item)[-1:] and log_lines(*item)[-1]["exception"].startswith(error)
                    )  # noqa: B023
                load.wait()
                assert bank.unbooked() > 0
    assert load.statuses() == {200}


def test_redis_full_is_redis_away(bank: Bank) -> None:
    bank.stream.config_set("maxmemory", 1)
    # Sending again is committed before it is tried: a failure means again after 2R.
    tried = """SELECT 1 FROM outbox JOIN transaksi ON id = id_transaksi
        WHERE dikirim_pada > tanggal_transaksi + interval '1500 ms'"""
    with bank.load() as load:
        eventually(lambda: bank.sql(tried))
        with hung(bank.mutasi):
            bank.stream.config_set("maxmemory", 0)
            eventually(lambda: bank.stream.xlen(STREAM) > 100)
            bad = bank.stream.xadd(STREAM, {"nominal": "bad"})
            bank.stream.config_set("maxmemory", 1)
        load.wait()
    assert load.statuses() == {200}
    # What is stored makes room, although the bad entry cannot be set aside.
    eventually(lambda: [entry for entry, _ in bank.stream.xrange(STREAM)] == [bad])
    assert bank.unbooked() > 0
    bank.stream.config_set("maxmemory", 0)
    eventually(lambda: bank.stream.xlen(DEAD_LETTER) == 1)


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)])
def test_what_redis_loses_is_sent_again(bank: Bank, times: int) -> None:
    """Under load and, the last time, while idle."""

    def trim_and_delete() -> None:
        bank.stream.xtrim(STREAM, maxlen=50, approximate=False)
        bank.stream.xdel(STREAM, *[entry for entry, _ in bank.stream.xrevrange(STREAM)][::5])

    def wipe() -> None:  # as if the volume of Redis were lost
        with away(bank.redis):
            shutil.rmtree(bank.redis.directory / "appendonlydir")

    with bank.load() as load:
        for lose in (bank.stream.flushall, trim_and_delete, wipe) * times:
            with hung(bank.mutasi):
                load.wait()
                eventually(lambda: bank.stream.xlen(STREAM) > 50)
                lose()
    assert load.statuses() == {200}
    eventually(lambda: log_lines(bank.transaksi, "movements sent from the outbox"))


def test_a_stream_whose_last_id_is_ahead_of_the_clock_causes_no_loop(bank: Bank) -> None:
    with hung(bank.mutasi):
        bank.stream.xadd(STREAM, {"nominal": "bad"}, id="9999999999999-0")
        started = time.monotonic()
        bank.send(bank.deposits(20))
        eventually(lambda: bank.stream.xlen(STREAM) >= 1 + 3 * 20)
        length, took = bank.stream.xlen(STREAM), time.monotonic() - started
    assert length <= 1 + 20 * (1 + took / 2)  # each movement again once in 2R


def test_while_mutasi_is_away_the_stream_stays_short_and_the_outbox_is_watched(bank: Bank) -> None:
    old_movement = """WITH old AS (INSERT INTO transaksi
        (id, no_rekening, jenis_transaksi, nominal, saldo_akhir, tanggal_transaksi) OVERRIDING SYSTEM VALUE
        VALUES (0, %s, 'tabung', 1, 1, now() - interval '11 s') RETURNING id)
        INSERT INTO outbox SELECT id FROM old; UPDATE rekening SET saldo = 1 WHERE no_rekening = %s"""
    transaksi = bank.start("transaksi", "--max-stream", "100", "--resend-after", "1")
    with hung(bank.mutasi):
        with bank.load((), transaksi) as load:
            load.wait(1000)
        assert load.statuses() == {200}
        length = bank.stream.xlen(STREAM)
        assert 100 <= length < 100 + 1000  # the limit and a batch
        eventually(lambda: log_lines(transaksi, "outbox is behind"))
        bank.sql(old_movement, account := bank.sql.open_account(), account)
        eventually(lambda: log_lines(transaksi, "outbox is far behind"))
        ids = {fields[b"id_transaksi"] for fields in bank.entries()}
        assert len(ids) == bank.stream.xlen(STREAM) == length  # what is late is not sent again
    eventually(lambda: log_lines(transaksi, "outbox has caught up"))
    told = [f"{line['level']}: {line['message']}" for line in log_lines(transaksi, "outbox .*")]
    assert told[:2] == ["WARNING: outbox is behind", "ERROR: outbox is far behind"]
    assert told[2:] == ["INFO: outbox has caught up"]


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_two_mutasi_killed_in_mid_insert_book_every_movement_once(bank: Bank, kills: int) -> None:
    inserting = "SELECT 1 FROM pg_locks WHERE relation = 'mutasi'::regclass AND NOT granted"
    for _ in range(kills):
        both = (bank.mutasi, bank.start("mutasi", "--batch-size", "7"))
        with bank.load() as load:
            load.wait()
            with bank.sql.holding("LOCK TABLE mutasi IN EXCLUSIVE MODE"):
                eventually(lambda: len(bank.sql(inserting)) == 2)
                for service in both:
                    service.stop(SIGKILL)
        bank.check()
        assert bank.stream.xlen(DEAD_LETTER) == 0


def test_what_an_operator_can_mend_is_no_poison(bank: Bank) -> None:
    bank.sql("REVOKE INSERT ON mutasi FROM mutasi")
    bank.send(bank.deposits(10))
    complaint = "permission denied for table mutasi"
    eventually(lambda: bank.sql.server.log.read_text().count(complaint) >= 3)  # it is retried
    line = log_lines(bank.mutasi, "processing failed")[0]
    assert (line["level"], line["exception"]) == ("ERROR", "InsufficientPrivilege 42501")
    bank.stream.acl_setuser("default", enabled=True, commands=["-xdel"])
    bank.sql("GRANT INSERT ON mutasi TO mutasi")
    bank.sql.audit()  # what was stored but not deleted comes again
    eventually(lambda: log_lines(bank.mutasi, "duplicate messages ignored"))
    bank.stream.acl_setuser("default", enabled=True, commands=["+xdel"])
    eventually(lambda: bank.stream.xlen(STREAM) == 0)
    assert bank.stream.xlen(DEAD_LETTER) == 0


def bad_messages(good: Message) -> Iterator[tuple[Message, str]]:
    """Variants of a good message that must not be booked, with their reasons."""
    invalid = {
        b"nominal": b"|-5|1.5|1\n|\xd9\xa1\xd9\xa2|" + b"7" * 1_000_000,
        b"id_transaksi": b"x|9999999999999999999|\x00",
        b"no_rekening": b"123|\xff\xfe34567890|1234567890\n",
        b"jenis_transaksi": b"transfer|tabung |\xc3\x28",
        b"tanggal_transaksi": b"yesterday|2026-01-01T00:00:00|1767225600",
        b"traceparent": b"\xff|" + b"z" * 100_000,
    }
    for name, values in invalid.items():
        for value in values.split(b"|"):
            yield good | {name: value}, f"{name.decode()} is missing or not valid"
    for error, date in (
        ("InvalidTimeZoneDisplacementValue", b"2026-01-01T00:00:00+99:99"),
        ("DatetimeFieldOverflow", b"2026-02-30T00:00:00+07:00"),
        ("ForeignKeyViolation", b"2026-01-01T00:00:00Z"),
    ):
        unknown = {b"id_transaksi": b"9" * 18, b"tanggal_transaksi": date}
        yield good | unknown, f"refused by the database: {error}"
    for name in good:
        yield {k: v for k, v in good.items() if k != name}, f"{name.decode()} is missing or not valid"
    for more in ({b"reason": b"mine"}, {b"\xff": b"1"}, {b"f%d" % n: b"" for n in range(1000)}):
        yield good | more, f"{len(more)} unknown field(s)"
    yield {b"": b""}, "1 unknown field(s)"


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_bad_and_forged_messages_are_set_aside_and_the_true_ones_booked(bank: Bank, count: int) -> None:
    bank.mutasi.stop(SIGKILL)
    with bank.load() as load:
        load.wait(count)
    eventually(lambda: bank.stream.xlen(STREAM) == bank.unbooked(), seconds=2)  # without being sent again
    ((next_id,),) = bank.sql("SELECT last_value + 1 FROM transaksi_id_seq")
    with hung(bank.transaksi):  # so that it sends nothing again that mutasi might lose
        *true, a, b, c, d = bank.entries()
        forged = [
            a | {b"nominal": b"999999"},
            b | {b"no_rekening": bank.sql.open_account().encode()},
            c | {b"jenis_transaksi": b"tarik" if c[b"jenis_transaksi"] == b"tabung" else b"tabung"},
            d | {b"tanggal_transaksi": b"2026-01-01T00:00:00+00:00"},
            a | {b"id_transaksi": b"%d" % next_id},  # of a movement still to come
        ]
        bad = [*bad_messages(true[0])]
        bad += [(message, "refused by the database: ForeignKeyViolation") for message in forged]
        messages = [*true, true[0], *(message for message, _ in bad)]  # the forged ones for true ones
        with bank.stream.pipeline() as pipe:
            pipe.delete(STREAM)
            for fields in random.sample(messages, len(messages)):
                pipe.xadd(STREAM, fields)
            pipe.execute()
        bank.mutasi.start()
        eventually(lambda: bank.stream.xlen(STREAM) == 0, 60)
        assert bank.unbooked() == 4
    letters = bank.entries(DEAD_LETTER)
    assert len(letters) == len(bad)
    for message, reason in bad:
        of_it = [letter for letter in letters if letter[b"reason"].startswith(reason.encode())]
        told = message.items() - {(b"reason", b"mine")}
        assert any(letter.items() >= told for letter in of_it), reason
    bank.send(bank.deposits(1))
    bank.sql.audit()
    assert bank.sql("SELECT nominal FROM mutasi WHERE id_transaksi = %s", next_id) == [(1,)]
    bank.stream.xadd(STREAM, forged[0])  # once more, after the true one
    eventually(lambda: len(log_lines(bank.mutasi, "message moved to dead letters")) == len(bad) + 1)
    assert b"ForeignKeyViolation" in bank.entries(DEAD_LETTER)[-1][b"reason"]
