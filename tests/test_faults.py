"""What must hold when things break: faults put into real processes and real servers, most of them under load.

The servers are this file's own; each test mends what it broke, and ends with `audit`: every movement is booked,
and balances, journal and mutation book agree. Unless a test says otherwise the reconcile comes too late (60 s) to help.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from signal import SIGCONT, SIGINT, SIGKILL, SIGQUIT, SIGSTOP
from typing import Any
from urllib.request import urlopen

import httpx
import psycopg2
import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from conftest import Database, Servers, eventually, log_lines, new_servers
from dev.local import Service
from tests.load import Load, Movement, mixed, movement, send
from transaksi.app import MAX_NOMINAL
from transaksi.datastore import reconcile

RICH = 1_000_000_000
DEAD_LETTER = "mutasi:dead-letter"
OWN_REASON = (b"reason", b"a field that the dead letter has too")
Start = Callable[..., Service]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with new_servers() as started:
        yield started


@pytest.fixture
def database(servers: Servers) -> Database:
    return servers.database


@pytest.fixture
def stream(servers: Servers) -> Iterator[Any]:  # untyped, as its answers are
    with servers.stream as client:
        client.flushall()
        yield client


@pytest.fixture
def start(servers: Servers) -> Iterator[Start]:
    """Starts services. Those that still run at the end of the test must stop in good order, in time."""
    services: list[Service] = []

    def started(name: str, *arguments: str) -> Service:
        services.append(servers.service(name, *arguments))
        services[-1].start()
        return services[-1]

    yield started
    assert {service.stop(timeout=8) for service in services if service.running} <= {0}


@pytest.fixture
def accounts(database: Database) -> list[str]:
    return [database.open_account(RICH) for _ in range(4)]


# ---------------------------------------------------------------- what the tests share


def answers_are_true(database: Database, movements: Sequence[Movement]) -> set[str]:
    """What was answered 200 is in the journal as told, what was refused is not; gives the journal's keys."""
    rows = database(
        "SELECT idempotency_key, no_rekening, jenis_transaksi, nominal, saldo_akhir FROM transaksi"
        " WHERE idempotency_key = ANY(%s)",
        [m.key for m in movements],
    )
    journal = {key: tuple(rest) for key, *rest in rows}
    for m in movements:
        if m.moved:
            assert journal.get(m.key) == (m.no_rekening, m.jenis, m.nominal, m.saldo)
        elif not m.uncertain:
            assert m.key not in journal, m
    return set(journal)


def repeating_is_exact(database: Database, url: str, movements: Sequence[Movement]) -> None:
    """Who was left not knowing repeats under the same key, and the money has moved once."""
    uncertain = [m for m in movements if m.uncertain]
    # A killed client's transaction may still be ending.
    eventually(lambda: database("SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in%%'") == [])
    there = answers_are_true(database, uncertain)
    for first in uncertain:
        (again,) = send([first.again()], url)
        assert again.moved, again
        assert ("\nidempotent-replayed: true" in again.headers) == (first.key in there)
    answers_are_true(database, movements)


def statuses(movements: Sequence[Movement]) -> set[int | None]:
    return {m.status for m in movements}


def under_way(load: Load, more: int = 200) -> None:
    """Return when so many more movements were accepted."""
    wanted = load.count(200) + more
    eventually(lambda: load.count(200) >= wanted, 60)


def unbooked(database: Database) -> int:
    """How many movements of the journal the mutation book does not have."""
    query = "SELECT count(*) FROM transaksi WHERE id NOT IN (SELECT id_transaksi FROM mutasi)"
    return int(database(query)[0][0])


@contextmanager
def locked(database: Database, no_rekening: str) -> Iterator[None]:
    """Hold an account's row, so that movements on it wait."""
    connection = psycopg2.connect(database.server.url())
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM rekening WHERE no_rekening = %s FOR UPDATE", (no_rekening,))
            yield
    finally:
        connection.close()


def somebody_waits(database: Database) -> bool:
    return bool(database("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))


def look_at(transaksi: Service, patience: float = 0.5) -> None:
    """Have one of the event loops answer on a new connection, without queue and database."""
    with urlopen(f"{transaksi.url}/openapi.json", timeout=patience) as answer:
        answer.read()


def all_are_in(database: Database, transaksi: Service) -> None:
    """Return when the requests sent to a locked account are in the queue: the event loops have gone round."""
    eventually(lambda: somebody_waits(database))
    for _ in range(20):
        look_at(transaksi, patience=10)


@contextmanager
def hung(database: Database) -> Iterator[None]:
    """PostgreSQL with all its processes stopped: its sockets are open, and nothing ever answers."""
    connection = psycopg2.connect(database.server.url())
    stopped = [database.server.pid]
    try:
        os.kill(database.server.pid, SIGSTOP)  # first, so that it forks no more
        with connection.cursor() as cursor:
            cursor.execute("SELECT pid FROM pg_stat_activity")
            backends = [pid for (pid,) in cursor]
        for pid in backends:
            os.kill(pid, SIGSTOP)
            stopped.append(pid)
        yield
    finally:
        for pid in reversed(stopped):
            os.kill(pid, SIGCONT)
        connection.close()


# ---------------------------------------------------------------- many at once


def test_the_reconcile_passes_no_movement_that_is_too_young(servers: Servers, accounts: list[str]) -> None:
    """Of two processes, the one with the lower id may have looked at the clock a moment later."""
    journal = """INSERT INTO transaksi (no_rekening, jenis_transaksi, nominal, saldo_akhir, tanggal_transaksi)
        VALUES (%s, 'tabung', 1, 1, now() - make_interval(secs => %s)) RETURNING id"""
    engine = create_engine(servers.postgres.url().replace("://", "+psycopg2://"), poolclass=NullPool)
    with engine.connect() as connection:  # rolled back
        old, young, as_old = (connection.exec_driver_sql(journal, (accounts[0], s)).scalar_one() for s in (61, 59, 61))
        found = reconcile(connection, old - 1, (), 60)
        assert found
        assert (found.checked, found.missing) == (old, [old])
        found = reconcile(connection, found.checked, found.missing, 58)
        assert found
        assert (found.checked, found.missing) == (as_old, [old, young, as_old])


def test_no_plan_of_the_services_reads_a_whole_table(start: Start, accounts: Sequence[str], database: Database) -> None:
    """First here, while the tables have a page each: a foreign key's plan made now would be a sequential scan."""

    def counted(column: str) -> int:
        tables = "relname IN ('rekening', 'transaksi', 'mutasi')"
        return int(database(f"SELECT sum({column}) FROM pg_stat_user_tables WHERE {tables}")[0][0])

    transaksi, _ = start("transaksi"), start("mutasi")
    eventually(lambda: not database("SELECT 1 FROM outbox"))
    database("ANALYZE")
    scans, rows = counted("seq_scan"), counted("n_tup_ins")
    with Load(mixed(accounts), transaksi.url):  # until both have told the statistics
        eventually(lambda: counted("n_tup_ins") > rows + 1000, 60)
    assert counted("seq_scan") == scans


def test_64_clients_on_one_account_leave_a_journal_without_a_gap(database: Database, start: Start) -> None:
    account = database.open_account()
    both = (one for m in mixed([account]) for one in (m, movement(account, "tarik", MAX_NOMINAL)))
    transaksi = start("transaksi", "--workers", "2")
    start("mutasi")
    with Load(both, transaksi.url, connections=64) as load:
        under_way(load, 1000)
    assert statuses(load.sent) == {200, 400}
    assert {m.body for m in load.sent if m.status == 400} == {b'{"remark":"Saldo tidak mencukupi."}'}
    answers_are_true(database, load.sent)
    saldo = 0
    for jenis, nominal, saldo_akhir in database(
        "SELECT jenis_transaksi, nominal, saldo_akhir FROM transaksi WHERE no_rekening = %s ORDER BY id", account
    ):
        saldo += nominal if jenis == "tabung" else -nominal
        assert saldo == saldo_akhir >= 0
    assert saldo == database.saldo(account)
    database.audit()


def test_two_instances_and_two_mutasi_never_deadlock(database: Database, start: Start, accounts: list[str]) -> None:
    one, two = start("transaksi", "--workers", "2"), start("transaksi")
    books = [start("mutasi"), start("mutasi")]
    with Load(mixed(accounts), one.url, two.url, connections=32) as load:
        under_way(load, 3000)
    assert statuses(load.sent) == {200}
    answers_are_true(database, load.sent)
    database.audit()
    for service in (one, two, *books):  # a backend that has ended has told its figures
        assert service.stop() == 0
    eventually(lambda: database("SELECT 1 FROM pg_stat_activity WHERE usename IN ('transaksi', 'mutasi')") == [])
    assert database("SELECT deadlocks FROM pg_stat_database WHERE datname = 'tabungan'") == [(0,)]


# ---------------------------------------------------------------- transaksi dies, or is told to stop


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_kill_9_of_transaksi_loses_nothing_and_moves_nothing_twice(
    database: Database, start: Start, accounts: list[str], kills: int
) -> None:
    start("mutasi")
    transaksi = start("transaksi")
    for n in range(kills):
        with Load(mixed(accounts), transaksi.url) as load:
            under_way(load, 50)
            time.sleep(random.uniform(0, 0.5))
            transaksi.stop(SIGKILL)
        assert None in statuses(load.sent)
        transaksi = start("transaksi", "--workers", str(2 - n % 2))
        repeating_is_exact(database, transaksi.url, load.sent)
    database.audit()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_under_load_leaves_no_movement_untold(
    database: Database, start: Start, accounts: list[str], workers: str
) -> None:
    transaksi = start("transaksi", "--workers", workers)
    start("mutasi")
    with Load(mixed(accounts), transaksi.url) as load:
        under_way(load)
        assert transaksi.stop(timeout=8) == 0
    untold = [m.key for m in load.sent if m.uncertain]
    assert answers_are_true(database, load.sent).isdisjoint(untold)
    assert statuses(load.sent) <= {200, None}
    transaksi.start()
    database.audit()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_lets_those_who_wait_have_their_answers_and_nobody_else_in(
    database: Database, start: Start, accounts: list[str], workers: str
) -> None:
    transaksi = start("transaksi", "--workers", workers, "--request-timeout", "10")
    start("mutasi")
    send([movement(accounts[0]) for _ in range(16)], transaksi.url)  # so that the PIN is known
    waiting = Load([movement(accounts[0]) for _ in range(16)], transaksi.url)
    with ThreadPoolExecutor() as pool:
        with locked(database, accounts[0]):
            waiting.start()
            all_are_in(database, transaksi)
            stopping = pool.submit(transaksi.stop, timeout=8)
            eventually(lambda: turned_away(transaksi))
            time.sleep(1)
            assert waiting.sent == []
        assert stopping.result() == 0
    waiting.join(timeout=20)
    assert [m.status for m in waiting.sent] == [200] * 16
    answers_are_true(database, waiting.sent)
    transaksi.start()
    database.audit()


def turned_away(transaksi: Service) -> bool:
    """Whether a new connection is served no more: refused, or left waiting by the supervisor of several."""
    try:
        look_at(transaksi)
    except OSError:
        return True
    return False


def test_a_dead_writer_ends_the_process(database: Database, start: Start, accounts: list[str]) -> None:
    transaksi = start("transaksi")
    # What the writer does not expect: an INSERT that silently leaves out a row.
    database(
        "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER skip BEFORE INSERT ON transaksi FOR EACH ROW WHEN (NEW.nominal = 13)"
        " EXECUTE FUNCTION skip()"
    )
    (lost,) = send([movement(accounts[0], nominal=13)], transaksi.url)
    eventually(lambda: not transaksi.running)
    assert transaksi.stop() == 1
    assert [line["level"] for line in log_lines(transaksi, "teller died")] == ["CRITICAL"]
    assert lost.status is None
    assert answers_are_true(database, [lost]) == set()
    database("DROP TRIGGER skip ON transaksi")
    transaksi.start()
    start("mutasi")
    database.audit()


# ---------------------------------------------------------------- the queue


def test_a_full_queue_turns_the_surplus_away_at_once(database: Database, start: Start, accounts: list[str]) -> None:
    transaksi = start("transaksi", "--max-queue", "5")
    start("mutasi")
    send([movement(accounts[0])], transaksi.url)
    load = Load([movement(accounts[0]) for _ in range(60)], transaksi.url, connections=60)
    with locked(database, accounts[0]):
        load.start()
        eventually(lambda: len(load.sent) >= 30)
        surplus = list(load.sent)
    load.join(timeout=20)
    assert statuses(surplus) == {503}
    assert not any(m.uncertain for m in surplus)
    accepted = [m for m in load.sent if m not in surplus]
    assert len(accepted) >= 5
    assert len(load.sent) == 60
    assert statuses(accepted) <= {200, 503}
    assert load.count(200) >= 5
    answers_are_true(database, load.sent)
    database.audit()


def test_one_bad_command_never_fails_its_neighbours(database: Database, start: Start, accounts: list[str]) -> None:
    transaksi = start("transaksi")
    start("mutasi")
    database("ALTER TABLE transaksi ADD CONSTRAINT bad CHECK (nominal <> 666) NOT VALID")
    send([movement(accounts[0])], transaksi.url)
    wishes = [movement(accounts[n % 4], nominal=666 if n in (5, 20) else n + 1) for n in range(30)]
    load = Load(wishes, transaksi.url, connections=30)
    with locked(database, accounts[0]):  # so that they make one batch
        load.start()
        all_are_in(database, transaksi)
    load.join(timeout=20)
    database("ALTER TABLE transaksi DROP CONSTRAINT bad")
    assert {m.nominal for m in wishes if not m.moved} == {666}
    assert [(m.status, m.uncertain) for m in wishes if not m.moved] == [(503, False)] * 2
    answers_are_true(database, wishes)
    database.audit()


# ---------------------------------------------------------------- PostgreSQL


@pytest.mark.parametrize("shutdown", [SIGINT, SIGQUIT], ids=["fast", "immediate"])
def test_postgresql_restarted_under_load(
    database: Database, start: Start, accounts: list[str], shutdown: signal.Signals
) -> None:
    transaksi, mutasi = start("transaksi"), start("mutasi")
    with Load(mixed(accounts), transaksi.url) as load:
        for _ in range(3):
            under_way(load)
            before = load.count(503)
            database.server.stop(shutdown)
            eventually(lambda: load.count(503) >= before + 32)  # noqa: B023 - called at once
            assert httpx.get(f"{transaksi.url}/health").status_code == 503
            database.server.start()
        under_way(load)
    assert statuses(load.sent) == {200, 503}
    assert httpx.get(f"{transaksi.url}/health").status_code == 200
    repeating_is_exact(database, transaksi.url, load.sent)
    database.audit()
    eventually(lambda: len(log_lines(transaksi, "PostgreSQL is back")) == 3)
    assert len(log_lines(transaksi, "PostgreSQL is away")) == 3
    assert transaksi.running
    assert mutasi.running


def test_a_connection_that_breaks_at_commit_leaves_the_outcome_unknown(
    database: Database, start: Start, accounts: list[str]
) -> None:
    transaksi = start("transaksi")
    start("mutasi")
    database(
        "CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(60); RETURN NULL; END';"
        "CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON transaksi INITIALLY DEFERRED FOR EACH ROW"
        " WHEN (NEW.nominal = 77) EXECUTE FUNCTION linger()"
    )
    wish = movement(accounts[0], nominal=77)
    load = Load([wish], transaksi.url, connections=1)
    load.start()
    committing = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    eventually(lambda: database(committing))
    load.join(timeout=20)
    assert (wish.status, wish.uncertain) == (503, True)
    database("DROP TRIGGER linger ON transaksi")
    repeating_is_exact(database, transaksi.url, [wish])
    database.audit()


def test_postgresql_that_hangs_costs_nobody_more_than_the_request_timeout(
    database: Database, start: Start, accounts: list[str]
) -> None:
    transaksi, stopped = start("transaksi", "--request-timeout", "2"), start("transaksi")
    start("mutasi")
    with Load(mixed(accounts), transaksi.url) as load:
        under_way(load)
        with hung(database):
            eventually(lambda: load.count(503) >= 2 * 16)
            assert httpx.get(f"{transaksi.url}/health", timeout=10).status_code == 503
            assert stopped.stop(timeout=8) == 0
        under_way(load)
    assert statuses(load.sent) == {200, 503}
    assert {m.uncertain for m in load.sent if m.status == 503} == {True, False}
    assert max(m.took for m in load.sent) < 2 + 3
    repeating_is_exact(database, transaksi.url, load.sent)
    database.audit()


# ---------------------------------------------------------------- Redis


@pytest.mark.parametrize("seconds", [3, pytest.param(10, marks=pytest.mark.long)])
def test_redis_away_fails_no_movement(
    database: Database, servers: Servers, start: Start, accounts: list[str], seconds: int
) -> None:
    transaksi, mutasi = start("transaksi"), start("mutasi")
    with Load(mixed(accounts), transaksi.url) as load:
        under_way(load)
        servers.redis.stop(SIGKILL)
        time.sleep(seconds)
        under_way(load)
        assert unbooked(database) > 0
        servers.redis.start()
        under_way(load)
    assert statuses(load.sent) == {200}
    database.audit()
    for service, server in ((transaksi, "the way to the stream"), (mutasi, "PostgreSQL or Redis")):
        lines = eventually(lambda: log_lines(service, f"{server} is back") and log_lines(service, f"{server} is .*"))  # noqa: B023
        assert [line["level"] for line in lines] == ["ERROR", "INFO"]


def test_redis_full_is_redis_away(database: Database, stream: Any, start: Start, accounts: list[str]) -> None:
    transaksi = start("transaksi")
    with Load(mixed(accounts), transaksi.url) as load:
        under_way(load)
        eventually(lambda: stream.xlen("mutasi") > 0)
        bad = stream.xadd("mutasi", {"nominal": "bad"})
        stream.config_set("maxmemory", 1)
        start("mutasi")
        under_way(load)
    assert statuses(load.sent) == {200}
    # What the stream has is stored and makes room, although the bad one cannot be set aside.
    eventually(lambda: [entry for entry, _ in stream.xrange("mutasi")] == [bad])
    eventually(lambda: log_lines(transaksi, "the way to the stream is away"))
    assert unbooked(database) > 0
    stream.config_set("maxmemory", 0)
    database.audit()
    eventually(lambda: stream.xlen("mutasi") == 0)
    assert stream.xlen(DEAD_LETTER) == 1


def flushed(stream: Any) -> None:
    stream.flushall()


def deleted_by_hand(stream: Any) -> None:
    stream.xdel("mutasi", random.choice(stream.xrange("mutasi"))[0])


def cut_at_the_tail(stream: Any) -> None:
    stream.xdel("mutasi", *(entry for entry, _ in stream.xrevrange("mutasi", count=3)))


@pytest.mark.parametrize("lose", [flushed, deleted_by_hand, cut_at_the_tail])
def test_what_redis_loses_while_idle_is_sent_again(
    database: Database, stream: Any, start: Start, lose: Callable[[Any], None]
) -> None:
    account = database.open_account()
    transaksi = start("transaksi", "--reconcile-after", "2")
    send([movement(account) for _ in range(10)], transaksi.url)
    eventually(lambda: stream.xlen("mutasi") == 10)
    lose(stream)
    assert unbooked(database) == 10
    start("mutasi")
    database.audit()
    assert database.saldo(account) == 10


def test_redis_flushed_again_and_again_in_mid_stream(
    database: Database, stream: Any, start: Start, accounts: list[str]
) -> None:
    transaksi = start("transaksi", "--reconcile-after", "2")
    start("mutasi")
    lost = 0
    with Load(mixed(accounts), transaksi.url) as load:
        while lost < 5:
            under_way(load, 50)
            lost += bool(eventually(lambda: stream.xlen("mutasi")))
            stream.flushall()
    assert statuses(load.sent) == {200}
    database.audit()


# ---------------------------------------------------------------- mutasi


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_kill_9_of_two_mutasi_books_every_movement_once(
    database: Database, stream: Any, start: Start, accounts: list[str], kills: int
) -> None:
    transaksi = start("transaksi")
    books = [start("mutasi"), start("mutasi", "--batch-size", "7")]
    with Load(mixed(accounts), transaksi.url) as load:
        for n in range(kills):
            under_way(load, 50)
            time.sleep(random.uniform(0, 0.3))
            books[n % 2].stop(SIGKILL)
            books[n % 2].start()
    database.audit()
    eventually(lambda: stream.xlen("mutasi") == 0)
    assert stream.xlen(DEAD_LETTER) == 0


def test_kill_9_of_mutasi_in_mid_insert_loses_nothing(database: Database, start: Start, accounts: list[str]) -> None:
    transaksi, mutasi = start("transaksi"), start("mutasi")
    connection = psycopg2.connect(database.server.url())
    with connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE mutasi IN EXCLUSIVE MODE")
        send([movement(accounts[0]) for _ in range(10)], transaksi.url)
        eventually(lambda: somebody_waits(database))
        mutasi.stop(SIGKILL)
    connection.close()
    mutasi.start()
    database.audit()


def test_what_was_stored_but_not_deleted_comes_again_and_is_known(
    database: Database, stream: Any, start: Start, accounts: list[str]
) -> None:
    transaksi, mutasi = start("transaksi"), start("mutasi")
    stream.acl_setuser("default", enabled=True, commands=["-xdel"])
    send([movement(accounts[0]) for _ in range(10)], transaksi.url)
    database.audit()
    assert stream.xlen("mutasi") >= 10
    mutasi.stop(SIGKILL)
    stream.acl_setuser("default", enabled=True, commands=["+xdel"])
    mutasi.start()
    eventually(lambda: stream.xlen("mutasi") == 0)
    eventually(lambda: log_lines(mutasi, "messages came again"))
    assert stream.xlen(DEAD_LETTER) == 0
    database.audit()


def late_is_not_lost(database: Database, stream: Any) -> None:
    """Past a reconcile's time of 3 s each movement not booked is still in outbox or stream, once."""
    eventually(lambda: stream.xlen("mutasi") > 0)
    time.sleep(5)
    ((in_outbox,),) = database("SELECT count(*) FROM outbox")
    assert in_outbox + stream.xlen("mutasi") == unbooked(database)


def test_while_mutasi_is_away_the_backlog_waits_in_postgresql(database: Database, stream: Any, start: Start) -> None:
    transaksi = start("transaksi", "--max-stream", "100", "--reconcile-after", "3")
    account = database.open_account(RICH)
    send([movement(account) for _ in range(10)], transaksi.url)
    late_is_not_lost(database, stream)
    with Load(mixed([account]), transaksi.url) as load:
        eventually(lambda: log_lines(transaksi, "backlog growing: .*"))
        length = stream.xlen("mutasi")
        under_way(load, 1000)
    assert statuses(load.sent) == {200}
    assert 100 <= length < 100 + 1000  # the limit and a batch of the relay
    assert stream.xlen("mutasi") == length
    late_is_not_lost(database, stream)
    start("mutasi")
    database.audit()


# ---------------------------------------------------------------- poison


def poison(good: dict[bytes, bytes]) -> list[tuple[dict[bytes, bytes], str]]:
    """Bad variants of a good message, each with what the reason must say."""

    def but(expected: str, **changed: bytes) -> tuple[dict[bytes, bytes], str]:
        return good | {name.encode(): value for name, value in changed.items()}, expected

    invalid = {
        "nominal": [b"", b"abc", b"-5", b"1.5", b"1e3", b" 1", b"1\n", "١٢".encode(), b"9" * 14, b"7" * 1_000_000],
        "id_transaksi": [b"x", b"-1", b"9" * 19, b"\x00"],
        "no_rekening": [b"123", b"1" * 17, b"12345\x0067890", b"\xff\xfe34567890", b"1234567890\n"],
        "jenis_transaksi": [b"transfer", b"TABUNG", b"tabung ", b"\xc3\x28"],
        "tanggal_transaksi": [b"yesterday", b"2026-01-01T00:00:00", b"2026-01-01", b"1767225600"],
        "traceparent": [b"\x00", b"\xff", b"z" * 100_000],
    }
    letters = [but(f"{name} is not valid", **{name: value}) for name in invalid for value in invalid[name]]
    letters += [({k: v for k, v in good.items() if k != name}, f"{name.decode()} is missing") for name in good]
    letters += [
        but("tanggal_transaksi is not a date", tanggal_transaksi=moment)
        for moment in (b"2026-13-45T00:00:00Z", b"2026-02-30T00:00:00+07:00", b"2026-01-01T00:00:00+99:99")
    ]
    unknown = b"999999999999999999"  # a valid message but for what the database knows
    letters += [
        but("refused by the database: ForeignKeyViolation", id_transaksi=unknown),
        but("refused by the database: ForeignKeyViolation", id_transaksi=unknown, no_rekening=b"9999999999"),
        but("refused by the database: CheckViolation", id_transaksi=unknown, nominal=b"0"),
        but("refused by the database: CheckViolation", id_transaksi=unknown, nominal=b"9999999999999"),
        but(
            "refused by the database: InvalidTimeZoneDisplacementValue",
            id_transaksi=unknown,
            tanggal_transaksi=b"2026-01-01T00:00:00+23:59",
        ),
        but("1 unknown field(s)", extra=b"1"),
        (good | dict([OWN_REASON]), "1 unknown field(s)"),
        (good | {b"\xff": b"1"}, "1 unknown field(s)"),
        (good | {b"f%d" % n: b"" for n in range(1000)}, "1000 unknown field(s)"),
        ({b"": b""}, "id_transaksi is missing"),
    ]
    return letters


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_poison_is_set_aside_and_the_good_messages_around_it_arrive(
    database: Database, stream: Any, start: Start, accounts: list[str], count: int
) -> None:
    transaksi = start("transaksi")
    with Load(mixed(accounts), transaksi.url) as load:
        under_way(load, count)
    eventually(lambda: database("SELECT count(*) FROM outbox") == [(0,)])
    assert transaksi.stop() == 0  # nobody will send again what is lost now
    good: list[dict[bytes, bytes]] = [fields for _, fields in stream.xrange("mutasi")]
    bad = poison(good[0])
    messages = [*good, *(fields for fields, _ in bad)]
    random.shuffle(messages)
    stream.delete("mutasi")
    with stream.pipeline() as pipe:
        for fields in messages:
            pipe.xadd("mutasi", fields)
        pipe.execute()
    mutasi = start("mutasi")
    database.audit()
    eventually(lambda: stream.xlen("mutasi") == 0)
    letters = [fields for _, fields in stream.xrange(DEAD_LETTER)]
    assert len(letters) == len(bad)
    for fields, reason in bad:
        assert any(
            letter[b"reason"].startswith(reason.encode()) and letter.items() >= fields.items() - {OWN_REASON}
            for letter in letters
        ), reason
    eventually(lambda: len(log_lines(mutasi, "message set aside as dead letter")) == len(bad))


@pytest.mark.parametrize(
    "harm",
    [
        (
            "REVOKE INSERT ON mutasi FROM mutasi",
            "GRANT INSERT ON mutasi TO mutasi",
            "42501",
            "permission denied for table mutasi",
        ),
        (
            "ALTER TABLE mutasi RENAME TO elsewhere",
            "ALTER TABLE elsewhere RENAME TO mutasi",
            "42P01",
            'relation "mutasi" does not exist',
        ),
    ],
    ids=["privilege", "table"],
)
def test_what_an_operator_can_mend_is_no_poison(
    database: Database, stream: Any, start: Start, harm: tuple[str, str, str, str]
) -> None:
    break_it, mend_it, sqlstate, complaint = harm
    transaksi, mutasi = start("transaksi"), start("mutasi")
    database(break_it)
    account = database.open_account(10)
    send([movement(account) for _ in range(10)], transaksi.url)
    eventually(lambda: database.server.log.read_text().count(complaint) >= 4)  # it is tried again
    (outage,) = eventually(lambda: log_lines(mutasi, "PostgreSQL or Redis is away"))
    assert (outage["level"], outage["sqlstate"]) == ("ERROR", sqlstate)
    assert stream.xlen(DEAD_LETTER) == 0
    database(mend_it)
    database.audit()
    eventually(lambda: log_lines(mutasi, "PostgreSQL or Redis is back"))
