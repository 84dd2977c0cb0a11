"""Faults in real processes and real servers, most of them under load.

The fixture `bank` ends each test with `Bank.check`: every answer was true, no key has moved
money twice, and in the end balances, journal and booked movements agree.
"""

import os
import re
import select
import shutil
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from random import randint
from signal import SIGINT, SIGKILL, SIGQUIT
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import create_engine

from common.stream import DEAD_LETTERS, FIELDS, STREAM, to_entry
from dev.local import HOST, PIN
from tests.load import Bank, Request, configured, get, hung
from tests.support import eventually, log_lines, running
from transaksi.datastore import lock_balances

LOCK_WAITERS = "FROM pg_stat_activity WHERE wait_event_type = 'Lock' OR wait_event = 'PgSleep'"
END_WAITING = f"SELECT pg_terminate_backend(pid, 5000) {LOCK_WAITERS}"
END_SESSIONS = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s"


def test_no_plan_reads_a_whole_table(bank: Bank) -> None:
    """Plans are cached, and those that were made while tables were small are used later."""
    bank.sql("ANALYZE")
    # Our own sessions scan tables; they have been counted when the session has gone.
    ours = "usename = 'postgres' AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    eventually(lambda: not bank.sql(f"SELECT 1 FROM pg_stat_activity WHERE {ours}"))
    counters = """SELECT sum(seq_scan), sum(n_tup_ins) FILTER (WHERE relname = 'mutasi') > 400
        AND sum(n_tup_upd) FILTER (WHERE relname = 'outbox') > 50 FROM pg_stat_user_tables"""
    ((scans, _),) = bank.sql(counters)

    with bank.load():
        with hung(bank.mutasi):
            eventually(lambda: bank.stream.xlen(STREAM) > 60)
            bank.stream.flushall()
        assert get(bank.transaksi, "/mutasi", bank.accounts[0]).status_code == 200
        eventually(lambda: bank.sql(counters)[0][1], 60)

    assert bank.sql(counters)[0][0] == scans


def test_sigterm_under_load_of_64_clients_answers_what_was_accepted(bank: Bank) -> None:
    both = (bank.transaksi, bank.started(bank.calm))
    with bank.load(*both, connections=64) as load:
        load.wait(1000)
        assert [service.stop(timeout=8) for service in both] == [0, 0]

    assert load.statuses().keys() <= {200, None}
    assert bank.journal().keys().isdisjoint(r.key for r in load.sent if r.unknown)


def test_sigterm_answers_and_sends_what_waits(bank: Bank) -> None:
    slow = bank.started(bank.slow)
    with hung(bank.transaksi):  # so that nobody resends anything
        with ThreadPoolExecutor() as pool, bank.queued(bank.deposits(60), slow) as load:
            stopping = pool.submit(slow.stop, timeout=8)
            with pytest.raises(httpx.TransportError):  # new connections are refused
                eventually(lambda: not get(slow, "/openapi.json"))
        assert stopping.result() == 0
        bank.sql.audit()

    assert load.statuses() == {200: 60}


def test_one_key_50_times_at_once_over_two_instances_moves_money_once(bank: Bank) -> None:
    repeats = bank.deposits(50, key=uuid4().hex)

    assert bank.send(repeats, bank.transaksi, bank.started(bank.calm)) == {200}

    assert [r.replayed for r in repeats].count(False) == 1
    assert len({r.saldo for r in repeats}) == 1


def test_repeats_of_a_key_that_wait_together_are_posted_in_order(bank: Bank) -> None:
    """The first is refused, and the deposit after it makes the second possible."""
    account = bank.sql.open_account()
    get(bank.transaksi, "/saldo", account)  # caches the PIN
    token = b64encode(f"{account}:{PIN}".encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
    connections = [HTTPConnection(HOST, bank.transaksi.port, timeout=60) for _ in range(5)]
    movements = [("/tarik", 20), ("/tabung", 90), ("/tarik", 20), ("/tarik", 20), ("/tarik", 30)]

    with bank.queued(bank.deposits(1)):
        for connection, (path, nominal) in zip(connections, movements, strict=True):
            body = f'{{"no_rekening": "{account}", "nominal": {nominal}}}'
            connection.request("POST", path, body, headers | {"Idempotency-Key": path})
            get(bank.transaksi, "/openapi.json")  # by now it waits
    statuses = [connection.getresponse().status for connection in connections]
    for connection in connections:
        connection.close()

    assert statuses == [400, 200, 200, 200, 422]


def test_two_tellers_lock_accounts_in_one_order(bank: Bank) -> None:
    """One account is held until both wait. In two orders, they would deadlock."""
    accounts = [bank.sql.open_account() for _ in range(20)]
    engine = create_engine(bank.sql.server.url("transaksi").replace("://", "+psycopg2://"))

    def lock_all() -> int:
        with engine.connect() as connection:
            return len(lock_balances(connection, accounts))

    with ThreadPoolExecutor() as pool:
        with bank.sql.holding(
            "SELECT FROM rekening WHERE no_rekening = %s FOR UPDATE", accounts[0]
        ):
            tellers = [pool.submit(lock_all) for _ in range(2)]
            eventually(lambda: bank.sql(f"SELECT count(*) {LOCK_WAITERS}") == [(2,)])
        locked = [teller.result() for teller in tellers]
    engine.dispose()

    assert locked == [20, 20]


def test_a_full_queue_refuses_the_excess(bank: Bank) -> None:
    faulty = bank.started(bank.faulty)

    with bank.queued(bank.deposits(60), faulty) as load:
        eventually(lambda: load.statuses()[503] >= 30)
        assert load.statuses().keys() == {503}

    assert load.statuses()[200] == 60 - load.statuses()[503] >= 5
    assert not any(r.unknown for r in load.sent)
    assert {line["reason"] for line in log_lines(faulty, "request failed")} == {"queue full"}


def test_a_movement_that_the_database_refuses_fails_alone(bank: Bank) -> None:
    bank.sql("ALTER TABLE transaksi ADD CONSTRAINT bad CHECK (nominal <> 666) NOT VALID")
    requests = [Request(bank.accounts[n % 4], nominal=666 - n % 15) for n in range(30)]

    with bank.queued(requests):  # so that they share a batch
        pass
    bank.sql("ALTER TABLE transaksi DROP CONSTRAINT bad")

    refused = [(r.nominal, r.status, r.unknown) for r in requests if r.status != 200]
    assert refused == [(666, 503, False)] * 2
    lines = eventually(lambda: log_lines(bank.transaksi, "request failed"))
    assert {line["reason"] for line in lines} == {"CheckViolation 23514 bad"}


def test_an_unexpected_error_before_commit_means_not_executed(bank: Bank) -> None:
    faulty, bad = bank.started(bank.faulty), bank.deposits(1, nominal=666)

    assert bank.send(bad, faulty) == {503}
    assert bank.send(bank.deposits(1), faulty) == {200}  # the process goes on

    assert not bad[0].unknown
    (line,) = log_lines(faulty, "unexpected error")
    assert (line["level"], "ZeroDivisionError" in line["error"]) == ("ERROR", True)


def test_a_connection_lost_before_commit_means_not_executed(bank: Bank) -> None:
    with bank.queued(requests := bank.deposits(1)):
        eventually(lambda: bank.sql(END_WAITING))

    assert [(r.status, r.unknown) for r in requests] == [(503, False)]


def test_a_connection_lost_at_commit_means_an_unknown_outcome(bank: Bank) -> None:
    bank.sql("""
        CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_sleep(60); END';
        CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON transaksi INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION linger()""")
    with bank.load(requests=(requests := bank.deposits(1))):
        eventually(lambda: bank.sql(END_WAITING))
    bank.sql("DROP TRIGGER linger ON transaksi")

    assert [(r.status, r.unknown) for r in requests] == [(503, True)]


def test_a_task_that_dies_stops_the_process(bank: Bank) -> None:
    faulty = bank.started(bank.faulty)

    assert bank.send(bank.deposits(1, nominal=667), faulty) == {200}
    eventually(lambda: not faulty.running)

    (line,) = log_lines(faulty, "a task failed")
    assert (line["level"], "ZeroDivisionError" in line["error"]) == ("CRITICAL", True)


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.long)])
def test_kill_9_loses_nothing_and_moves_nothing_twice(bank: Bank, rounds: int) -> None:
    booking = "SELECT 1 FROM pg_locks WHERE relation = 'mutasi'::regclass AND NOT granted"
    for _ in range(rounds):
        with bank.service("mutasi") as second, bank.load() as load:
            load.wait()
            with bank.sql.holding("LOCK TABLE mutasi IN EXCLUSIVE MODE"):
                eventually(lambda: len(bank.sql(booking)) == 2)
                second.stop(SIGKILL)
                bank.mutasi.stop(SIGKILL)
            bank.transaksi.stop(SIGKILL)
            bank.repair()
            load.wait()
            bank.redis.stop(SIGKILL)
            load.wait(randint(20, 100))  # which are in the outbox only
            bank.transaksi.stop(SIGKILL)
            bank.mutasi.stop(SIGKILL)
        assert load.statuses().keys() <= {200, None}
        assert bank.sql("SELECT 1 FROM outbox")
        bank.check()
        assert bank.stream.xlen(DEAD_LETTERS) == 0


def test_a_full_disk_and_a_log_reader_that_leaves_harm_no_movement(bank: Bank) -> None:
    os.mkfifo(pipe := bank.directory / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    services = []
    for name, stdout in (("mutasi", pipe), ("transaksi", "/dev/full")):
        shell = ("sh", "-c", f'exec "$0" "$@" >{stdout} 2>&1', sys.executable)
        services.append(bank.service(name, python=shell))
    mutasi, transaksi = services
    mutasi.console = True  # so that nobody waits for its first line

    bank.mutasi.stop()
    with running(mutasi, transaksi):
        select.select([reader], [], [], 60)  # until it has written
        os.close(reader)
        for _ in range(3):
            assert bank.send(bank.deposits(50), transaksi) == {200}
        bank.sql.audit()
        assert [transaksi.stop(timeout=8), mutasi.stop(timeout=8)] == [0, 0]


def test_after_a_restart_of_postgresql_nobody_meets_a_stale_connection(bank: Bank) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):  # the first time fills the connection pools
            bank.sql.server.start()  # stops it first
            new = [bank.sql.open_account() for _ in range(8)]
            reads = pool.map(partial(get, bank.transaksi, "/saldo"), new)
            assert bank.send([Request(account) for account in new]) == {200}
            assert {answer.status_code for answer in reads} == {200}


@pytest.mark.parametrize("signal", [SIGQUIT, SIGINT], ids=["crash", "shutdown"])
def test_while_postgresql_is_unavailable_nothing_is_executed(bank: Bank, signal: int) -> None:
    with bank.load() as load:
        load.wait()
        bank.sql.server.stop(signal)
        load.wait(32, 503)
        for path in ("/health", "/saldo", "/mutasi"):
            answer = get(bank.transaksi, path, bank.accounts[0])
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        bank.sql.server.start()
        load.wait()

    assert load.statuses().keys() == {200, 503}
    assert "/health" in {line["path"] for line in log_lines(bank.transaksi, "request failed")}


def test_postgresql_that_hangs_delays_no_answer(bank: Bank) -> None:
    new = bank.sql.open_account()
    quick = bank.started(bank.quick)
    with bank.load(quick) as load, ThreadPoolExecutor() as pool:
        load.wait()
        with hung(bank.sql.server):
            tried = (("/saldo", new), ("/saldo", bank.accounts[0]), ("/health", ""))
            waiting = [pool.submit(get, quick, *one) for one in tried]  # the first checks a PIN
            load.wait(2 * 16, 503)
            answers = [one.result() for one in waiting]
        load.wait()

    assert {(a.status_code, a.headers["Retry-After"]) for a in answers} == {(503, "1")}
    assert {(r.status, r.unknown) for r in load.sent} >= {(503, False), (503, True)}


def test_sessions_that_postgresql_ends_under_load_harm_nobody(bank: Bank) -> None:
    with bank.load() as load:
        for role in ("transaksi", "mutasi") * 3:
            load.wait(20)
            bank.sql(END_SESSIONS, role)
        load.wait(20)

    assert load.statuses().keys() <= {200, 503}


def test_a_session_that_postgresql_ends_costs_mutasi_no_error(bank: Bank) -> None:
    assert bank.sql(END_SESSIONS, "mutasi")

    assert bank.send(bank.deposits(1)) == {200}
    bank.sql.audit()
    assert "ERROR" not in {line["level"] for line in log_lines(bank.mutasi)}


def test_defaults_of_another_postgresql_server_do_not_matter(bank: Bank) -> None:
    idle = """state = 'idle' AND usename <> 'postgres' AND state_change > pg_conf_load_time()
        AND clock_timestamp() - state_change > '1 s'"""
    calm = bank.started(bank.calm)

    with (
        configured(bank.sql.server, "default_transaction_isolation", "serializable"),
        configured(bank.sql.server, "idle_session_timeout", "500ms"),
    ):
        with bank.load(bank.transaksi, calm) as load:
            load.wait(300)
        eventually(lambda: bank.sql(f"SELECT 1 FROM pg_stat_activity WHERE {idle}"))
        bank.sql.audit()

    assert load.statuses().keys() == {200}
    for service in (bank.transaksi, calm, bank.mutasi):
        assert "ERROR" not in {line["level"] for line in log_lines(service)}


def test_redis_unavailable_or_hung_fails_no_movement(bank: Bank) -> None:
    def last_errors() -> list[str]:
        sending = log_lines(bank.transaksi, "sending to the stream failed")
        processing = log_lines(bank.mutasi, "processing failed")
        return [line["error"].partition(":")[0] for line in (*sending[-1:], *processing[-1:])]

    with bank.load() as load:
        bank.redis.stop(SIGKILL)
        eventually(lambda: last_errors() == ["ConnectionError"] * 2)
        load.wait()
        bank.redis.start()
        with hung(bank.redis):
            eventually(lambda: last_errors() == ["TimeoutError"] * 2)
            load.wait()

    assert load.statuses().keys() == {200}


@pytest.mark.parametrize("loss", ["trimmed", "wiped"])
def test_what_redis_loses_is_resent(bank: Bank, loss: str) -> None:
    with bank.load() as load, hung(bank.mutasi):
        load.wait()
        eventually(lambda: bank.stream.xlen(STREAM) > 60)
        if loss == "trimmed":
            newest = bank.stream.xrevrange(STREAM, count=10)
            bank.stream.xdel(STREAM, *[entry for entry, _ in newest])
            bank.stream.xtrim(STREAM, maxlen=10, approximate=False)
        else:  # as if its volume were lost
            shutil.rmtree(bank.redis.directory / "appendonlydir")
        bank.redis.stop(SIGKILL)
        bank.redis.start()
        load.wait()

    assert load.statuses().keys() == {200}
    eventually(lambda: log_lines(bank.transaksi, "movements resent"))


def test_what_is_merely_delayed_is_not_resent(bank: Bank) -> None:
    with hung(bank.mutasi):
        bank.stream.xadd(STREAM, {"nominal": "bad"}, id="1-0")  # has waited since 1970
        bank.send(bank.deposits(20))
        due = "SELECT 1 FROM outbox WHERE dikirim_pada < clock_timestamp() - interval '3 s'"
        eventually(lambda: bank.sql(due) and bank.stream.xlen(STREAM) > 20)
        assert bank.stream.xlen(STREAM) == 1 + 20


def test_ids_ahead_of_the_clock_cause_no_loop(bank: Bank) -> None:
    with hung(bank.mutasi):
        bank.stream.xadd(STREAM, {"nominal": "bad"}, id="9999999999999-0")
        began = time.monotonic()
        bank.send(bank.deposits(20))
        eventually(lambda: bank.stream.xlen(STREAM) >= 1 + 3 * 20)
        assert time.monotonic() - began > 2 * 2  # each movement again once in 2R


def test_a_full_redis_fails_no_movement_and_bad_messages_do_not_block_it(bank: Bank) -> None:
    with hung(bank.mutasi):
        bank.send(bank.deposits(20))
        bank.stream.xadd(STREAM, {"nominal": "bad"})
        eventually(lambda: bank.stream.xlen(STREAM) > 20)
        bank.stream.config_set("maxmemory", 1)
    eventually(lambda: bank.stream.xlen(STREAM) == 0)  # which makes room

    assert bank.send(bank.deposits(20)) == {200}
    failure, *_ = eventually(lambda: log_lines(bank.transaksi, "sending to the stream failed"))
    (line,) = eventually(lambda: log_lines(bank.mutasi, "bad message"))
    bank.stream.config_set("maxmemory", 0)

    assert failure["error"].startswith("OutOfMemoryError")
    assert (line["level"], line["dead_letter"]) == ("ERROR", False)
    assert bank.stream.xlen(DEAD_LETTERS) == 0


def test_while_mutasi_is_unavailable_the_age_of_the_outbox_is_reported(bank: Bank) -> None:
    clock = "ALTER TABLE transaksi ALTER tanggal_transaksi SET DEFAULT clock_timestamp()"

    def told(level: str) -> list[Any]:
        lines = log_lines(bank.transaksi, "outbox is behind")
        return [line["age_s"] for line in lines if line["level"] == level]

    for seconds, level in ((4, "WARNING"), (14, "ERROR")):  # more than 3R and 10R
        bank.sql.audit()  # mutasi holds no lock
        with hung(bank.mutasi):
            bank.sql(f"{clock} - interval '{seconds} s'")
            bank.send(bank.deposits(1))
            bank.sql(clock)
            assert eventually(partial(told, level))[0] >= seconds
            with bank.load() as load:
                load.wait()
        assert load.statuses().keys() == {200}


@contextmanager
def unsent(bank: Bank) -> Iterator[dict[bytes, bytes]]:
    """Yield the message of a new movement. transaksi hangs until the end, so nobody sends it."""
    with hung(bank.transaksi):
        columns = "id, tanggal_transaksi, no_rekening, jenis_transaksi, nominal"
        query = f"SELECT {columns} FROM transaksi WHERE no_rekening = %s"
        (values,) = bank.sql(query, bank.sql.open_account(5))
        entry = to_entry(dict(zip(FIELDS, (*values, None), strict=True)))
        yield {name.encode(): str(value).encode() for name, value in entry.items()}


def add_batch(bank: Bank, *messages: dict[bytes, bytes]) -> list[bytes]:
    """Add messages to the stream at once. Returns their ids when they have been processed."""
    with bank.stream.pipeline() as pipe:
        for message in messages:
            pipe.xadd(STREAM, message)
        ids: list[bytes] = pipe.execute()
    eventually(lambda: bank.stream.xlen(STREAM) == 0)
    return ids


# F is the forged message, T the true one; a space separates batches.
@pytest.mark.parametrize(("order", "letters"), [("F", 1), ("FT", 1), ("TF", 0), ("T F", 0)])
def test_a_forged_message_is_not_booked(bank: Bank, order: str, letters: int) -> None:
    with unsent(bank) as true:
        forged = true | {b"nominal": b"987654321"}
        for batch in order.split():
            add_batch(bank, *[{"T": true, "F": forged}[which] for which in batch])

    assert bank.stream.xlen(DEAD_LETTERS) == letters
    told = "bad message" if letters else "duplicate messages ignored"
    eventually(lambda: log_lines(bank.mutasi, told))
    assert b"987654321" not in bank.mutasi.log.read_bytes()


SQL = "'; DROP TABLE rekening; --|' OR '1'='1|$$; SELECT 1; $$|{1}|%(no)s :no \\|"
NUMBERS = "1e3| 5|+5|5.0|\u0665|0|-5||5_0|05|0x5|5\n|5\0|99999999999999999999|\udcff5"
DATES = "now|infinity||2026-01-31|1767225600|2026-01-31T00:00:00+00:00|2026-01-31T00:00:00.000000"
ZONES = "|2026-01-31T00:00:00.000000+07:00|2026-01-31T00:00:00.000000Z|2026-02-30T00:00:00.000000Z"
ACCOUNTS = f"123|1234567890\n|1234567890\0|{chr(0x665) * 10}|{'1' * 1_000_000}|Zoë"
FORGED = "ForeignKeyViolation 23503 mutasi_id_transaksi_no_rekening_jenis_transaksi_nominal_ta_fkey"
BAD = [  # field, values, reason
    ("id_transaksi", SQL + NUMBERS, "id_transaksi: value_error|UnicodeDecodeError"),
    ("id_transaksi", "9223372036854775808", "id_transaksi: less_than"),
    ("nominal", SQL + NUMBERS, "nominal: value_error|UnicodeDecodeError"),
    ("nominal", "1000000000001", "nominal: less_than_equal"),
    ("tanggal_transaksi", SQL + DATES + ZONES, "tanggal_transaksi: value_error"),
    ("no_rekening", SQL + ACCOUNTS, "no_rekening: string_pattern_mismatch"),
    ("jenis_transaksi", SQL + "setor|Tarik||tarik\0", "jenis_transaksi: literal_error"),
    ("traceparent", SQL + "00-1|\0", "traceparent: string_pattern_mismatch"),
    # These have the right form, but differ from the journal.
    ("nominal", "999999", FORGED),
    ("no_rekening", "1234567890", FORGED),
    ("jenis_transaksi", "tarik", FORGED),
    ("tanggal_transaksi", "2026-01-31T00:00:00.000000+00:00", FORGED),
    ("id_transaksi", "9223372036854775807", FORGED),
]


def test_bad_messages_become_dead_letters_with_their_reason(bank: Bank) -> None:
    with unsent(bank) as true:
        bad = [({b"id_transaksi": b"1"}, "tanggal_transaksi: missing")]
        for field, values, reason in BAD:
            for value in values.split("|"):
                text = value.encode(errors="surrogateescape")  # \udcff is the byte FF
                bad.append((true | {field.encode(): text}, reason))
        entries = add_batch(bank, *[message for message, _ in bad], true)

    letters = [letter for _, letter in bank.stream.xrange(DEAD_LETTERS)]
    for letter, entry, (message, reason) in zip(letters, entries[:-1], bad, strict=True):
        assert re.fullmatch(reason, letter[b"reason"].decode()), message
        assert letter == message | {b"entry": entry, b"reason": letter[b"reason"]}
    assert len(eventually(lambda: log_lines(bank.mutasi, "mutation stored"))) == 1


def test_unknown_fields_of_a_message_are_ignored(bank: Bank) -> None:
    with unsent(bank) as true:
        unknown = {b"f%d" % n: b"\xff" for n in range(1000)} | {b"\xff": bytes(10**6)}
        add_batch(bank, true | unknown)

    assert bank.stream.xlen(DEAD_LETTERS) == 0


def test_two_instances_of_mutasi_book_each_movement_once(bank: Bank) -> None:
    with bank.service("mutasi") as second:
        lock = bank.sql.holding("LOCK TABLE mutasi IN EXCLUSIVE MODE")
        with bank.load() as load, lock:
            load.wait(1000)
        bank.sql.audit()
    services = (bank.mutasi, second)

    def ids() -> list[int]:  # a batch is logged after its commit
        lines = [line for service in services for line in log_lines(service, "mutation stored")]
        return [line["id_transaksi"] for line in lines]

    eventually(lambda: len(ids()) >= 1000)
    assert len(set(ids())) == len(ids())


def test_what_an_operator_can_mend_is_retried(bank: Bank) -> None:
    bank.sql("REVOKE INSERT ON mutasi FROM mutasi")
    bank.send(bank.deposits(10))
    failures = eventually(lambda: log_lines(bank.mutasi, "processing failed")[1:])
    bank.sql("GRANT INSERT ON mutasi TO mutasi")
    bank.sql.audit()

    assert failures[0]["error"] == "InsufficientPrivilege 42501"
    assert bank.stream.xlen(DEAD_LETTERS) == 0


def test_what_is_stored_but_not_deleted_is_redelivered_and_ignored(bank: Bank) -> None:
    bank.stream.acl_setuser("default", enabled=True, commands=["-xdel"])
    bank.send(bank.deposits(10))
    eventually(lambda: log_lines(bank.mutasi, "duplicate messages ignored"))
    bank.stream.acl_setuser("default", enabled=True, commands=["+xdel"])
    bank.sql.audit()

    eventually(lambda: len(log_lines(bank.mutasi, "mutation stored")) >= 10)
    assert len(log_lines(bank.mutasi, "mutation stored")) == 10


def test_without_its_life_sign_mutasi_books_on(bank: Bank) -> None:
    signs = eventually(lambda: list(bank.directory.glob("mutasi-*/alive")))
    with hung(bank.mutasi):
        for sign in signs:  # one is of the mutasi that runs now
            shutil.rmtree(sign.parent)
    (line,) = eventually(lambda: log_lines(bank.mutasi, "no health file"))

    bank.send(bank.deposits(1))
    bank.sql.audit()

    assert line["level"] == "WARNING"
    assert len(log_lines(bank.mutasi, "no health file")) == 1
    for sign in signs:
        sign.parent.mkdir()
    eventually(lambda: list(bank.directory.glob("mutasi-*/alive")))


@pytest.mark.parametrize("server", ["sql", "redis"])
def test_mutasi_shows_no_life_while_a_server_hangs(bank: Bank, server: str) -> None:
    def age() -> float:
        signs = bank.directory.glob("mutasi-*/alive")
        return time.time() - max((sign.stat().st_mtime for sign in signs), default=0)

    eventually(lambda: age() < 1)
    with hung(bank.redis if server == "redis" else bank.sql.server):
        eventually(lambda: age() > 2)

    eventually(lambda: age() < 1)
