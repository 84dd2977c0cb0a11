"""Nobody in who does not belong: each test is an attempt to get in, to learn something, or to do harm."""

import asyncio
import gc
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import bcrypt
import httpx
import psycopg2
import pytest
from psycopg2.errors import FeatureNotSupported, InsufficientPrivilege
from redis.exceptions import RedisError
from sqlalchemy import Engine

from conftest import PIN, Database, Nasabah, Servers, eventually, log_lines, new_servers
from dev.local import HOST, Service
from servers import describe, open_postgres
from settings import Settings
from transaksi import pin as pin_module
from transaksi.app import Unavailable
from transaksi.pin import FLOOR_S, THREADS, NotAuthenticated, PinCheck

WRONG = "000000"
ROLES = ("transaksi", "mutasi")
Start = Callable[..., Service]
Counter = Callable[..., Nasabah]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with new_servers() as started:
        yield started


@pytest.fixture(scope="module")
def database(servers: Servers) -> Database:
    return servers.database


@pytest.fixture(scope="module")
def transaksi(servers: Servers) -> Iterator[Service]:
    """Two workers with the limits as they are by default."""
    with servers.service("transaksi", "--workers", "2") as service:
        yield service


@pytest.fixture
def start(servers: Servers) -> Iterator[Start]:
    """Starts services that end with the test."""
    with ExitStack() as stack:

        def started(name: str, *arguments: str) -> Service:
            return stack.enter_context(servers.service(name, *arguments))

        yield started


@pytest.fixture(scope="module")
def mutasi(servers: Servers) -> Iterator[Service]:
    with servers.service("mutasi") as service:
        yield service


@pytest.fixture
def account(database: Database) -> str:
    return database.open_account()


@pytest.fixture
def stream(servers: Servers) -> Iterator[Any]:  # untyped, as its answers are
    with servers.stream as client:
        yield client


# ---------------------------------------------------------------- what the tests share


def enter(service: Service, no_rekening: str, pin: str = PIN) -> httpx.Response:
    """A deposit over a connection of its own, so that any worker may get it."""
    payload = {"no_rekening": no_rekening, "nominal": 1}
    return httpx.post(f"{service.url}/tabung", json=payload, auth=(no_rekening, pin), timeout=30)


def at_once(service: Service, credentials: Sequence[tuple[str, str]]) -> list[httpx.Response]:
    """The same for many at the same time."""

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            url = f"{service.url}/tabung"
            posts = (client.post(url, json={"no_rekening": a, "nominal": 1}, auth=(a, p)) for a, p in credentials)
            return await asyncio.gather(*posts)

    return asyncio.run(all_of_them())


def statuses(answers: Sequence[httpx.Response]) -> set[int]:
    return {answer.status_code for answer in answers}


def failures(database: Database, no_rekening: str) -> tuple[int, bool]:
    """How many are counted, and whether the account is locked."""
    query = "SELECT pin_gagal, coalesce(terkunci_sampai > now(), false) FROM kredensial WHERE no_rekening = %s"
    ((counted, locked),) = database(query, no_rekening)
    return counted, locked


def lock(database: Database, no_rekening: str, until: str = "1 hour") -> None:
    database(
        "UPDATE kredensial SET pin_gagal = 5, terkunci_sampai = now() + %s::interval WHERE no_rekening = %s",
        until,
        no_rekening,
    )


def set_pin(database: Database, no_rekening: str, pin: str) -> None:
    pin_hash = bcrypt.hashpw(pin.encode(), bcrypt.gensalt(10)).decode()
    database("UPDATE kredensial SET pin_hash = %s WHERE no_rekening = %s", pin_hash, no_rekening)


def told_from_now(*services: Service) -> Callable[[], str]:
    """Gives what they have logged since this call."""
    sizes = [(service.log, service.log.stat().st_size) for service in services]
    return lambda: "".join(log.read_bytes()[size:].decode() for log, size in sizes)


@contextmanager
def trigger(database: Database, table: str, body: str) -> Iterator[None]:
    """A superuser's own trigger on each row written to a table, for a while."""
    database(
        "CREATE FUNCTION uji() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
        f" AS $$ BEGIN {body}; RETURN NEW; END $$"
    )
    database(f"CREATE TRIGGER uji BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION uji()")
    try:
        yield
    finally:
        database("DROP FUNCTION uji() CASCADE")


@pytest.fixture
def checks(database: Database) -> Iterator[Callable[[], int]]:
    """How often a PIN was checked and not remembered: each time ends with an UPDATE of `kredensial`."""
    database("CREATE TABLE uji_pin ()")
    with trigger(database, "kredensial", "INSERT INTO uji_pin DEFAULT VALUES"):
        yield lambda: int(database("SELECT count(*) FROM uji_pin")[0][0])
    database("DROP TABLE uji_pin")


# ---------------------------------------------------------------- the lock


def test_five_failures_lock_over_two_workers_and_a_restart(start: Start, database: Database, account: str) -> None:
    transaksi = start("transaksi", "--workers", "2")
    assert statuses([enter(transaksi, account, WRONG) for _ in range(5)]) == {401}
    assert failures(database, account) == (5, True)
    query = "SELECT terkunci_sampai - now() FROM kredensial WHERE no_rekening = %s"
    ((locked_for,),) = database(query, account)
    assert timedelta(minutes=10) < locked_for <= timedelta(minutes=15)

    row = "SELECT xmin::text, k FROM kredensial k WHERE no_rekening = %s"
    before = database(row, account)
    assert statuses([enter(transaksi, account, pin) for pin in (PIN, WRONG, PIN, "000001")]) == {401}
    transaksi.stop()
    transaksi.start()
    assert statuses([enter(transaksi, account, pin) for pin in (PIN, WRONG, PIN)]) == {401}
    assert database(row, account) == before  # attempts during a lock write nothing, extend nothing

    lock(database, account, until="-1 second")
    assert enter(transaksi, account, WRONG).status_code == 401
    assert failures(database, account) == (6, True)
    assert enter(transaksi, account).status_code == 401
    lock(database, account, until="-1 second")
    assert enter(transaksi, account).status_code == 200
    assert failures(database, account) == (0, False)


def test_a_success_forgets_the_failures_before_it(transaksi: Service, database: Database, account: str) -> None:
    assert statuses([enter(transaksi, account, WRONG) for _ in range(4)]) == {401}
    assert failures(database, account) == (4, False)
    assert enter(transaksi, account).status_code == 200
    assert failures(database, account) == (0, False)
    assert statuses([enter(transaksi, account, WRONG) for _ in range(4)]) == {401}
    assert failures(database, account) == (4, False)


def test_a_hundred_guesses_at_once_are_five_guesses(transaksi: Service, database: Database, account: str) -> None:
    guesses = [(account, f"{number:06}") for number in range(100)]
    guessing: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: guessing.extend(at_once(transaksi, guesses)))
    thread.start()
    eventually(lambda: failures(database, account)[1])
    late = [enter(transaksi, account) for _ in range(4)]  # the right PIN, among those still under way
    thread.join()
    assert len(guessing) == 100
    assert statuses(guessing) <= {401, 503}
    assert statuses(late) <= {401, 503}
    assert failures(database, account) == (5, True)


@pytest.mark.parametrize("pin", [PIN, WRONG])
def test_a_lock_that_comes_during_the_check_counts(
    transaksi: Service, database: Database, account: str, pin: str
) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(enter(transaksi, account, pin)))
    connection = psycopg2.connect(database.server.url())
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "UPDATE kredensial SET pin_gagal = 5, terkunci_sampai = now() + interval '1 hour'"
                " WHERE no_rekening = %s",
                (account,),
            )
            thread.start()
            eventually(lambda: database("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
    finally:
        connection.close()
    thread.join()
    assert statuses(answers) == {401}
    assert failures(database, account) == (5, True)


def test_sixty_four_first_requests_at_once_cost_one_check_per_process(
    start: Start, database: Database, account: str, checks: Callable[[], int]
) -> None:
    transaksi = start("transaksi", "--workers", "2", "--max-pin-failures", "1")
    assert statuses(at_once(transaksi, [(account, PIN)] * 64)) == {200}
    assert failures(database, account) == (0, False)
    assert 1 <= checks() <= 2


# ---------------------------------------------------------------- one face


def test_every_401_is_the_same_and_none_comes_early_that_knows_the_account(
    transaksi: Service, database: Database, account: str
) -> None:
    locked = database.open_account()
    lock(database, locked)
    faces = []
    for authorization in ("", "Basic", "Bearer MTIzNDU2Nzg5MDoxMjM0NTY=", "Basic !", "Basic MTIzNDU2Nzg5MDoxMjM0NQ=="):
        headers = {"Authorization": authorization} if authorization else {}
        faces.append(httpx.post(f"{transaksi.url}/tabung", headers=headers))
    for no_rekening, pin in ((account, WRONG), ("9999999999", PIN), (locked, PIN), (locked, WRONG)):
        began = time.monotonic()
        faces.append(enter(transaksi, no_rekening, pin))
        assert time.monotonic() - began > 0.99 * FLOOR_S
    assert statuses(faces) == {401}
    assert faces[0].headers["www-authenticate"] == 'Basic realm="transaksi", charset="UTF-8"'
    for face in faces:
        del face.headers["date"]
        assert (face.headers.multi_items(), face.content) == (faces[0].headers.multi_items(), faces[0].content)


# ---------------------------------------------------------------- the remembered check


def test_a_changed_pin_is_honoured_once_the_memory_has_ended(start: Start, database: Database, account: str) -> None:
    transaksi = start("transaksi", "--auth-cache-ttl", "2")
    assert enter(transaksi, account).status_code == 200
    set_pin(database, account, "654321")
    assert enter(transaksi, account, "654321").status_code == 200
    eventually(lambda: enter(transaksi, account).status_code == 401)
    assert enter(transaksi, account).status_code == 401


def test_a_failure_is_not_remembered(transaksi: Service, database: Database, account: str) -> None:
    assert enter(transaksi, account, "654321").status_code == 401
    set_pin(database, account, "654321")
    assert enter(transaksi, account, "654321").status_code == 200


@pytest.mark.parametrize(("ttl", "expected"), [("0", 3), ("3600", 1)])
def test_only_without_a_memory_each_request_is_checked(
    start: Start, account: str, checks: Callable[[], int], ttl: str, expected: int
) -> None:
    transaksi = start("transaksi", "--auth-cache-ttl", ttl)
    assert statuses([enter(transaksi, account) for _ in range(3)]) == {200}
    assert checks() == expected


def test_who_is_remembered_is_not_thrown_out_by_a_lock(
    transaksi: Service, nasabah: Counter, database: Database, account: str
) -> None:
    customer = nasabah(transaksi.url, account)  # one connection, so one worker
    assert customer.tabung(1).status_code == 200
    lock(database, account)
    assert customer.tabung(1).status_code == 200
    assert enter(transaksi, account, WRONG).status_code == 401
    assert failures(database, account) == (5, True)


@pytest.fixture
def engine(servers: Servers) -> Iterator[Engine]:
    settings = Settings(
        db_host=HOST,
        db_port=servers.postgres.port,
        db_name="tabungan",
        db_user="transaksi",
        db_password=servers.postgres.passwords["transaksi"],
    )
    engine = open_postgres(settings, pool_size=THREADS)
    yield engine
    engine.dispose()


@pytest.fixture
def check(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[PinCheck]:
    """With room for two in its memory."""
    monkeypatch.setattr(pin_module, "MAX_REMEMBERED", 2)
    check = PinCheck(engine, 60, 5, 15)
    yield check
    check.stop()


def verdicts(check: PinCheck, *credentials: tuple[str, str]) -> list[str]:
    """What it says of these, one after the other."""

    async def all_of_them() -> list[str]:
        said = []
        for no_rekening, pin in credentials:
            deadline = asyncio.get_running_loop().time() + 30
            try:
                await check.check(no_rekening, pin.encode(), time.monotonic(), deadline)
                said.append("in")
            except (NotAuthenticated, Unavailable) as refusal:
                said.append(str(refusal))
        return said

    return asyncio.run(all_of_them())


def test_no_account_and_pin_can_be_read_as_another_pair(check: PinCheck, database: Database) -> None:
    pairs = [("1234567890", "123456"), ("12345678901", "23456"), ("123456789012", "3456"), ("123456789", "0123456")]
    assert verdicts(check, *pairs) == ["in", *["unknown account"] * 3]
    assert failures(database, "1234567890") == (0, False)


def test_the_memory_is_bounded(check: PinCheck, database: Database) -> None:
    known = [(database.open_account(), PIN) for _ in range(4)]
    strangers = [(f"9{number:09}", PIN) for number in range(4)]
    assert verdicts(check, *known, *strangers) == ["in"] * 4 + ["unknown account"] * 4
    gc.collect()
    assert (len(check._remembered), len(check._running), len(check._turns)) == (2, 0, 0)


def within(*roots: object) -> Iterator[object]:
    """All that is reachable, but for code and what it refers to."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        code = isinstance(thing, (type, ModuleType, FunctionType, BuiltinFunctionType))
        if id(thing) not in seen and not code:
            seen.add(id(thing))
            yield thing
            waiting += gc.get_referents(thing)


def test_the_memory_keeps_no_pin(check: PinCheck, database: Database, account: str) -> None:
    right, wrong = "860429", "318075"
    set_pin(database, account, right)
    assert verdicts(check, (account, wrong), (account, right)) == ["wrong PIN", "in"]

    def kept() -> list[str]:
        variables = []
        for thread in threading.enumerate():
            frame = sys._current_frames().get(thread.ident or 0) if thread.name == "pin" else None
            while frame:
                variables.append(frame.f_locals)
                frame = frame.f_back
        return [str(thing) for thing in within(check, *variables) if isinstance(thing, (str, bytes))]

    eventually(lambda: not any(pin in text for text in kept() for pin in (right, wrong)))
    ((digest, remembered),) = check._remembered.items()
    assert str(digest) in kept()  # it would have been seen
    assert remembered == account


# ---------------------------------------------------------------- a flood


def test_a_flood_of_guesses_is_turned_away_and_leaves_those_who_are_in(
    start: Start, nasabah: Counter, account: str
) -> None:
    transaksi = start("transaksi", "--request-timeout", "60")  # so that it is the queue that turns them away
    customer = nasabah(transaksi.url, account)
    assert customer.tabung(1).status_code == 200
    flood: list[httpx.Response] = []
    guesses = [(f"9{number:09}", PIN) for number in range(200)]
    thread = threading.Thread(target=lambda: flood.extend(at_once(transaksi, guesses)))
    thread.start()
    served = 0
    while thread.is_alive():
        assert customer.tabung(1).status_code == 200
        served += 1
    thread.join()
    assert served > 10
    assert len(flood) == 200
    assert statuses(flood) == {401, 503}
    surplus = [answer for answer in flood if answer.status_code == 503]
    assert {answer.headers["retry-after"] for answer in surplus} == {"1"}
    assert len(surplus) > 50  # 64 may wait, and few are checked meanwhile


def test_guesses_under_way_do_not_spoil_the_end(start: Start) -> None:
    transaksi = start("transaksi")
    guesses = [(f"9{number:09}", PIN) for number in range(40)]

    def guess() -> None:
        with suppress(httpx.TransportError):
            at_once(transaksi, guesses)

    thread = threading.Thread(target=guess)
    thread.start()
    told = told_from_now(transaksi)
    eventually(lambda: "unknown account" in told())
    assert transaksi.stop(timeout=8) == 0
    thread.join()


def test_a_check_that_hangs_at_the_end_is_answered(
    start: Start, nasabah: Counter, database: Database, account: str
) -> None:
    transaksi = start("transaksi", "--request-timeout", "10")
    connection = psycopg2.connect(database.server.url())
    with closing(connection), connection.cursor() as cursor, ThreadPoolExecutor() as pool:
        cursor.execute("LOCK TABLE kredensial")
        asking = pool.submit(nasabah(transaksi.url, account).tabung, 1)
        eventually(lambda: database("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        assert transaksi.stop(timeout=8) == 0
        assert (asking.result().status_code, asking.result().headers["retry-after"]) == (503, "1")
    assert not log_lines(transaksi, "(?s)Exception.*")


@pytest.mark.parametrize("start_line", [b"POST /tabung HTTP/1.1\r\n", b"POST /tabung HTTP/1.1\r\nX: ", b"POST /"])
@pytest.mark.parametrize("piece", [b"X: y\r\n", b"x"])
def test_a_request_whose_head_never_ends_is_cut_off(transaksi: Service, start_line: bytes, piece: bytes) -> None:
    with socket.create_connection((HOST, transaksi.port), timeout=30) as line:
        line.sendall(start_line)
        much = piece * (50_000_000 // len(piece))
        with pytest.raises(ConnectionError):
            line.sendall(much)


# ---------------------------------------------------------------- the roles

BOTH_BOOKS = [
    f"{statement} {book}{rest}"
    for book in ("transaksi", "mutasi")
    for statement, rest in (("UPDATE", " SET nominal = 1"), ("DELETE FROM", ""), ("TRUNCATE", " CASCADE"))
]
NOBODY = [
    *BOTH_BOOKS,
    "INSERT INTO rekening (no_rekening, nama, saldo) VALUES ('5555555555', 'x', 1)",
    "INSERT INTO kredensial (no_rekening, pin_hash) VALUES ('1234567890', 'x')",
    "UPDATE kredensial SET pin_hash = 'x'",
    "UPDATE rekening SET no_rekening = '5555555555'",
    "DELETE FROM rekening",
    "DELETE FROM kredensial",
    "SELECT nama FROM rekening",
    "SELECT * FROM audit_saldo",
    "SELECT buka_rekening('5555555555', 'x', 'x', 1)",
    "INSERT INTO mutasi (id_transaksi, no_rekening, dicatat_pada) VALUES (1, '1', now())",
    "INSERT INTO transaksi (id, no_rekening, jenis_transaksi, nominal, saldo_akhir) OVERRIDING SYSTEM VALUE"
    " VALUES (9, '1234567890', 'tabung', 1, 1)",
    "INSERT INTO transaksi (no_rekening, jenis_transaksi, nominal, saldo_akhir, tanggal_transaksi)"
    " VALUES ('1234567890', 'tabung', 1, 1, '2000-01-01')",
    "ALTER TABLE transaksi DISABLE TRIGGER ALL",
    "DROP TRIGGER append_only ON mutasi",
    "DROP TABLE outbox",
    "CREATE OR REPLACE FUNCTION tolak_perubahan() RETURNS trigger LANGUAGE plpgsql AS ''",
    "SET session_replication_role = replica",
    "SET ROLE postgres",
    "CREATE TABLE t ()",
    "CREATE TEMPORARY TABLE t ()",
    "CREATE SCHEMA s",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE ROLE r SUPERUSER",
    "CREATE DATABASE d",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "GRANT ALL ON rekening TO PUBLIC",
    "COPY outbox FROM PROGRAM 'id'",
    "SELECT pg_read_file('PG_VERSION')",
    "SELECT rolpassword FROM pg_authid",
    "ALTER SYSTEM SET fsync = off",
]
FORBIDDEN = [(role, statement) for role in ROLES for statement in NOBODY]
FORBIDDEN += [
    ("transaksi", "INSERT INTO mutasi (id_transaksi, no_rekening, tanggal_transaksi) VALUES (1, '1', now())"),
    *(("mutasi", f"SELECT 1 FROM {table}") for table in ("rekening", "kredensial", "transaksi", "outbox")),
    ("mutasi", "UPDATE rekening SET saldo = 0"),
    ("mutasi", "UPDATE kredensial SET pin_gagal = 0, terkunci_sampai = NULL"),
    ("mutasi", "INSERT INTO outbox (id_transaksi) VALUES (1)"),
    ("mutasi", "DELETE FROM outbox"),
]


def execute(servers: Servers, role: str, statement: str) -> None:
    connection = psycopg2.connect(servers.postgres.url(role))
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()


@pytest.mark.parametrize(("role", "statement"), FORBIDDEN, ids=[f"{r}: {s[:60]}" for r, s in FORBIDDEN])
def test_a_service_may_not(servers: Servers, role: str, statement: str) -> None:
    with pytest.raises(InsufficientPrivilege):
        execute(servers, role, statement)


@pytest.mark.parametrize("statement", BOTH_BOOKS)
def test_even_the_owner_finds_the_books_append_only(servers: Servers, statement: str) -> None:
    with pytest.raises(FeatureNotSupported, match="append-only"):
        execute(servers, "postgres", statement)


def test_the_roles_are_nothing_but_that(servers: Servers, database: Database) -> None:
    attributes = "rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls"
    found = database(f"SELECT rolname, {attributes} FROM pg_roles WHERE rolname = ANY(%s)", list(ROLES))
    assert sorted(found) == [(role, *[False] * 5) for role in sorted(ROLES)]
    owned = "SELECT relname FROM pg_class WHERE relowner::regrole::text = ANY(%s)"
    assert database(owned, list(ROLES)) == []
    assert database("SELECT 1 FROM pg_auth_members WHERE member::regrole::text = ANY(%s)", list(ROLES)) == []
    for role in ROLES:
        for other in ("postgres", "template1"):
            with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
                psycopg2.connect(servers.postgres.url(role).replace("/tabungan", f"/{other}"))


# ---------------------------------------------------------------- what errors give away


@pytest.mark.parametrize("sqlstate", ["23514", "P0001"])
@pytest.mark.parametrize("table", ["rekening", "kredensial", "transaksi", "outbox", "mutasi"])
def test_no_database_error_tells_its_text(
    transaksi: Service, mutasi: Service, servers: Servers, database: Database, account: str, table: str, sqlstate: str
) -> None:
    told = told_from_now(transaksi, mutasi)
    leak = f"RAISE EXCEPTION 'bocor %%', NEW USING ERRCODE = '{sqlstate}', DETAIL = 'bocor ' || NEW::text"
    with trigger(database, table, leak):
        answer = enter(transaksi, account)
        assert answer.status_code == (200 if table == "mutasi" else 503)
        eventually(lambda: re.search('"status": 503|PostgreSQL or Redis is away|dead letter', told()))
    eventually(lambda: enter(transaksi, account).status_code == 200)  # it has done no lasting harm
    assert "bocor" in servers.postgres.log.read_text()  # the server itself has said it
    assert "bocor" not in told() + answer.text
    assert account not in told()


def test_no_redis_error_tells_the_movement(stream: Any, account: str) -> None:
    stream.set("uji", "no stream")
    pipe = stream.pipeline()
    pipe.xadd("uji", {"no_rekening": account})
    with pytest.raises(RedisError, match=account) as caught:
        pipe.execute()
    stream.delete("uji")
    told = str(describe(caught.value))
    assert "WRONGTYPE" in told
    assert account not in told


# ---------------------------------------------------------------- SQL in every field

INJECTIONS = [
    "'; DROP TABLE rekening; --",
    "' OR '1'='1",
    "$$; SELECT pg_sleep(30); $$",
    "{1234567890}",
    "%(no)s :no \\",
]


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.usefixtures("mutasi")
def test_sql_in_a_field_is_text(
    transaksi: Service, nasabah: Counter, database: Database, stream: Any, account: str, text: str
) -> None:
    customer = nasabah(transaksi.url, account)
    assert customer.post("/tabung", 1, no_rekening=text).status_code == 400
    assert customer.post("/tabung", text).status_code == 400
    assert enter(transaksi, text).status_code == 401
    assert enter(transaksi, account, text).status_code == 401
    assert [customer.tabung(5, idempotency_key=text).json() for _ in range(2)] == [{"saldo": 5}] * 2
    keys = database("SELECT idempotency_key FROM transaksi WHERE no_rekening = %s", account)
    assert keys == [(text,)]
    letters = stream.xlen("mutasi:dead-letter")
    good = message(database, account)
    for field in good:
        stream.xadd("mutasi", good | {field: text})
    eventually(lambda: stream.xlen("mutasi:dead-letter") == letters + len(good))
    eventually(lambda: booked(database, account) == [(5,)])
    assert database.saldo(account) == 5


# ---------------------------------------------------------------- who can write to the stream


def message(database: Database, no_rekening: str) -> dict[str, Any]:
    """What the stream says of an account's newest movement."""
    query = (
        "SELECT id, tanggal_transaksi, jenis_transaksi, nominal FROM transaksi"
        " WHERE no_rekening = %s ORDER BY id DESC LIMIT 1"
    )
    ((number, moment, jenis, nominal),) = database(query, no_rekening)
    return {
        "id_transaksi": number,
        "tanggal_transaksi": moment.isoformat(),
        "no_rekening": no_rekening,
        "jenis_transaksi": jenis,
        "nominal": nominal,
    }


def booked(database: Database, no_rekening: str) -> list[tuple[Any, ...]]:
    return database("SELECT nominal FROM mutasi WHERE no_rekening = %s ORDER BY id_transaksi", no_rekening)


def test_a_forged_message_moves_no_money_and_changes_no_booked_movement(
    transaksi: Service, mutasi: Service, nasabah: Counter, database: Database, stream: Any, account: str
) -> None:
    other = database.open_account(1000)
    assert nasabah(transaksi.url, account).tabung(100).status_code == 200
    eventually(lambda: (booked(database, account), booked(database, other)) == ([(100,)], [(1000,)]))
    real = message(database, account)
    letters = stream.xlen("mutasi:dead-letter")
    forged = {
        "another amount": real | {"nominal": 999},
        "another kind": real | {"jenis_transaksi": "tarik"},
        "no such movement": real | {"id_transaksi": 10**17},
        "another account": real | {"id_transaksi": 10**17, "no_rekening": other},
        "a reason of its own": real | {"reason": "it is fine"},
    }
    for fields in forged.values():
        stream.xadd("mutasi", fields)
    eventually(lambda: stream.xlen("mutasi:dead-letter") == letters + 3)
    eventually(lambda: stream.xlen("mutasi") == 0)
    assert (booked(database, account), booked(database, other)) == ([(100,)], [(1000,)])
    assert (database.saldo(account), database.saldo(other)) == (100, 1000)
    reasons = [fields[b"reason"] for _, fields in stream.xrange("mutasi:dead-letter")][-3:]
    assert all(b"refused by the database" in r or r == b"1 unknown field(s)" for r in reasons)
    assert mutasi.running


def test_a_message_forged_before_the_real_one_cannot_name_another_account_and_is_found_out(
    start: Start, mutasi: Service, nasabah: Counter, database: Database, stream: Any, account: str
) -> None:
    mutasi.stop()
    other = database.open_account()
    transaksi = start("transaksi", "--reconcile-after", "2")
    assert nasabah(transaksi.url, account).tabung(100).status_code == 200
    eventually(lambda: database("SELECT count(*) FROM outbox") == [(0,)])
    real = message(database, account)
    with stream.pipeline() as pipe:  # at once, since what is not there will be sent again
        pipe.delete("mutasi")
        pipe.xadd("mutasi", real | {"no_rekening": other})
        pipe.xadd("mutasi", real | {"nominal": 999})
        pipe.execute()
    mutasi.start()
    eventually(lambda: booked(database, account) == [(999,)])
    assert booked(database, other) == []
    eventually(lambda: "audit difference" in transaksi.log.read_text(), 40)
    (line,) = [line for line in transaksi.log.read_text().splitlines() if "audit difference" in line]
    assert '"CRITICAL"' in line
    assert f'"id_transaksi": [{real["id_transaksi"]}]' in line
    assert (database.saldo(account), database.saldo(other)) == (100, 0)


def test_a_key_of_the_wrong_kind_stops_mutasi_only_while_it_is_there(
    transaksi: Service, mutasi: Service, database: Database, stream: Any, account: str
) -> None:
    eventually(lambda: database("SELECT count(*) FROM outbox") == [(0,)] and not stream.xlen("mutasi"))
    told = told_from_now(mutasi)
    stream.set("mutasi", "no stream")
    assert enter(transaksi, account).status_code == 200
    eventually(lambda: "is away" in told())
    stream.delete("mutasi")
    eventually(lambda: booked(database, account) == [(1,)])
    assert mutasi.running
