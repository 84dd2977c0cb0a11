"""Who may come in, what the database roles may do, and what errors give away."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import httpx
import pytest
from psycopg2.errors import FeatureNotSupported

from dev.local import Service
from tests.support import PIN, PIN_HASH, Customer, Servers, eventually, log_lines, new_servers

Customers = Callable[..., Customer]
MESSAGE = {"id_transaksi": "17", "tanggal_transaksi": "2026-01-31T23:59:59.123456+07:00"}
MESSAGE |= {"no_rekening": "0123456789", "jenis_transaksi": "tarik", "nominal": "25000"}
GUESSES = [f"{number:06}" for number in range(200)]
LOCK = "UPDATE kredensial SET pin_gagal = 5, terkunci_sampai = now() + %s::interval WHERE no_rekening = %s"
ATTEMPTS = "SELECT pin_gagal, terkunci_sampai > now() FROM kredensial WHERE no_rekening = %s"
# Run by every process at its start: notes comparisons, and holds those of a PIN while a file has its name.
SITECUSTOMIZE = """
import os, pathlib, time, bcrypt
here, checkpw = pathlib.Path(__file__).parent, bcrypt.checkpw
def noted(password, hashed):
    (here / "comparisons").open("ab", 0).write(b"%d %s\\n" % (os.getpid(), hashed))
    while (here / password.decode()).exists():
        time.sleep(0.01)
    return checkpw(password, hashed)
bcrypt.checkpw = noted
"""


class Bank:
    """The services: `transaksi` has two processes, `forgetful` checks every request's PIN."""

    def __init__(self, servers: Servers) -> None:
        self.servers, self.database, self.directory = servers, servers.database, servers.directory
        (self.directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
        service = partial(
            servers.service, "transaksi", environment={"PYTHONPATH": str(self.directory)}
        )
        self.service = service
        # A long time limit, so that it is the queue that turns a flood of guesses away.
        self.transaksi = service("--workers", "2", "--request-timeout", "60", "--resend-after", "1")
        self.forgetful = service("--auth-cache-ttl", "0", "--request-timeout", "60")
        self.mutasi = servers.service("mutasi")

    def comparisons(self, pin_hash: str = PIN_HASH) -> list[str]:
        """The process of each comparison in this test with this hash, by default that of all accounts."""
        lines = (self.directory / "comparisons").read_text().splitlines()
        return [line.split()[0] for line in lines if pin_hash in line]


@pytest.fixture(scope="module")
def bank() -> Iterator[Bank]:
    with new_servers() as servers:
        bank = Bank(servers)
        with bank.transaksi, bank.forgetful, bank.mutasi:
            yield bank


@pytest.fixture
def account(bank: Bank) -> str:
    (bank.directory / PIN).unlink(missing_ok=True)
    (bank.directory / "comparisons").write_text("")
    return bank.database.open_account()


def enter(service: Service, account: str, *pins: str) -> list[int]:
    """The statuses that these PINs get at once, each over a connection of its own, to any process."""
    get = partial(httpx.get, f"{service.url}/saldo", timeout=60, verify=False)
    with ThreadPoolExecutor(len(pins)) as clients:
        return [
            answer.status_code for answer in clients.map(lambda pin: get(auth=(account, pin)), pins)
        ]


def test_five_failures_lock_an_account_over_workers_and_a_restart(bank: Bank, account: str) -> None:
    wrong = GUESSES[:5]
    assert enter(bank.forgetful, account, *wrong[:4]) == [401] * 4
    assert (enter(bank.forgetful, account, PIN), bank.database(ATTEMPTS, account)) == (
        [200],
        [(0, None)],
    )
    assert enter(bank.transaksi, account, *wrong) == [401] * 5
    row = "SELECT terkunci_sampai - now(), xmin::text FROM kredensial WHERE no_rekening = %s"
    ((left, version),) = bank.database(row, account)
    assert 10 * 60 < left.total_seconds() <= 15 * 60
    with bank.servers.service("transaksi", "--auth-cache-ttl", "2") as later:
        assert (
            enter(bank.transaksi, account, PIN, *wrong)
            == enter(later, account, PIN, *wrong)
            == [401] * 6
        )
        assert bank.database(row, account)[0][1] == version  # attempts during a lock write nothing
        for pin, status, attempts in ((wrong[0], 401, (6, True)), (PIN, 200, (0, None))):
            bank.database(LOCK, "-1 second", account)
            assert (enter(later, account, pin), bank.database(ATTEMPTS, account)) == (
                [status],
                [attempts],
            )
        bank.database(LOCK, "1 hour", account)
        eventually(lambda: enter(later, account, PIN) == [401])  # remembered for two seconds


def test_two_hundred_guesses_at_once_are_five_and_stop_nobody(bank: Bank, account: str) -> None:
    served, held = 0, bank.directory / PIN
    with ThreadPoolExecutor() as pool, Customer(bank.transaksi.url, account).client as owner:
        assert owner.get("/saldo").status_code == 200
        held.touch()
        login = pool.submit(enter, bank.forgetful, account, PIN)
        eventually(lambda: len(bank.comparisons()) == 2)
        assert bank.database(ATTEMPTS, account) == [(1, None)]  # bcrypt is still at it
        guessing = pool.submit(enter, bank.transaksi, account, *GUESSES)
        while not guessing.done():  # who is remembered goes on, also when the account is locked
            assert owner.get("/saldo").status_code == 200
            served += 1
        held.unlink()  # the login is one of the five attempts, and erases none that came after it
    assert (login.result(), served > 10) == ([200], True)
    assert (len(bank.comparisons()), *bank.database(ATTEMPTS, account)) == (2 + 4, (5, True))
    assert (
        20 < guessing.result().count(503) == 200 - guessing.result().count(401)
    )  # 64 wait in a process


def test_a_shared_check_outlives_the_first_who_asked(bank: Bank, account: str) -> None:
    with ThreadPoolExecutor() as pool, bank.service("--request-timeout", "3") as brief:
        (held := bank.directory / PIN).touch()
        first = pool.submit(enter, brief, account, PIN)
        eventually(bank.comparisons)
        bank.database("SELECT pg_sleep(1)")  # so that the first alone reaches its time limit
        second = pool.submit(enter, brief, account, PIN)
        assert first.result() == [503]
        held.unlink()
    assert (second.result(), len(bank.comparisons())) == ([200], 1)


def test_right_pin_is_compared_once_per_process_or_always_as_configured(
    bank: Bank, account: str
) -> None:
    for _ in range(2):  # at once they share a comparison, later it is remembered
        assert set(enter(bank.transaksi, account, *[PIN] * 64)) == {200}
    processes = bank.comparisons()
    assert 1 <= len(processes) == len(set(processes)) <= 2
    assert enter(bank.forgetful, account, PIN) + enter(bank.forgetful, account, PIN) == [200] * 2
    assert len(bank.comparisons()) == len(processes) + 2


def test_every_401_is_the_same_after_300_ms_and_one_comparison(bank: Bank, account: str) -> None:
    bank.database(LOCK, "1 hour", locked := bank.database.open_account())
    wrong = ((account, "000000"), ("9999999999", PIN), (locked, PIN), (locked, "000000"))
    answers = [
        httpx.get(f"{bank.transaksi.url}/saldo", auth=pair) for pair in (*wrong, ("malformed", PIN))
    ]
    assert min(answer.elapsed.total_seconds() for answer in answers) > 0.3
    for answer in answers:
        del answer.headers["Date"]
    faces = {(answer.status_code, answer.text, *answer.headers.multi_items()) for answer in answers}
    assert [face[0] for face in faces] == [401]
    assert len(bank.comparisons("")) == len(bank.comparisons("$2b$10$")) == len(wrong)


def test_roles_have_just_the_rights_that_the_services_need(bank: Bank) -> None:
    # a INSERT, c CONNECT, r SELECT, U USAGE, w UPDATE, X EXECUTE; nobody before "=": PUBLIC
    expected = """public:=U tabungan:transaksi=c tabungan:mutasi=c refuse_change:=X template0:=c
    rekening.no_rekening:transaksi=r rekening.saldo:transaksi=rw kredensial:transaksi=r
    kredensial.pin_gagal:transaksi=w kredensial.terkunci_sampai:transaksi=w transaksi:transaksi=r
    transaksi.no_rekening:transaksi=a transaksi.jenis_transaksi:transaksi=a transaksi.nominal:transaksi=a
    transaksi.saldo_akhir:transaksi=a transaksi.idempotency_key:transaksi=a
    transaksi.traceparent:transaksi=a outbox:transaksi=ar outbox.dikirim_pada:transaksi=w
    mutasi:transaksi=r mutasi:mutasi=r mutasi.id_transaksi:mutasi=a
    mutasi.no_rekening:mutasi=a mutasi.tanggal_transaksi:mutasi=a mutasi.jenis_transaksi:mutasi=a
    mutasi.nominal:mutasi=a"""
    # Of others than the superuser: on objects (ours have oids from 16384 on), on databases, and in general.
    rights = bank.database("""
    SELECT name || ':' || split_part(acl::text, '/', 1) FROM (
        SELECT oid, relname::text, relacl FROM pg_class
        UNION ALL SELECT attrelid, attrelid::regclass || '.' || attname, attacl FROM pg_attribute
        UNION ALL SELECT oid, proname, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
        UNION ALL SELECT 16384, datname, coalesce(datacl, acldefault('d', datdba)) FROM pg_database
        UNION ALL SELECT oid, nspname, nspacl FROM pg_namespace
    ) AS object (oid, name, acls), unnest(acls) AS acl
    WHERE (oid >= 16384 OR name = 'public') AND acl::text !~ '^(postgres|pg_database_owner)='
    UNION ALL SELECT rolname FROM pg_roles WHERE rolname IN ('transaksi', 'mutasi') AND (
        rolsuper OR rolcreatedb OR rolcreaterole OR rolbypassrls OR rolreplication OR oid IN (
            SELECT member FROM pg_auth_members UNION SELECT refobjid FROM pg_shdepend WHERE deptype = 'o'))
    UNION SELECT proname FROM pg_proc WHERE prosecdef AND coalesce(proconfig::text, '') !~ 'search_path='""")
    assert sorted(right for (right,) in rights) == sorted(expected.split())


@pytest.mark.parametrize("book", ["transaksi", "mutasi"])
@pytest.mark.parametrize(
    "change", ["UPDATE {} SET nominal = 1", "DELETE FROM {}", "TRUNCATE {} CASCADE"]
)
def test_books_are_append_only_even_for_their_owner(bank: Bank, book: str, change: str) -> None:
    with pytest.raises(FeatureNotSupported, match="append-only"):
        bank.database(change.format(book))


def test_text_of_server_errors_is_told_nowhere(
    bank: Bank, account: str, customer: Customers
) -> None:
    ani, postgres, answers = customer(bank.forgetful.url, account), bank.servers.postgres.log, []
    for table in ("rekening", "kredensial", "transaksi", "outbox", "mutasi"):
        bank.database(f"ALTER TABLE {table} ADD CONSTRAINT uji CHECK (false) NOT VALID")
        size = postgres.stat().st_size
        answers.append(ani.deposit(1))
        eventually(lambda: b"Failing row contains" in postgres.read_bytes()[size:])  # noqa: B023 - at once
        bank.database(f"ALTER TABLE {table} DROP CONSTRAINT uji")
    bank.servers.stream.config_set(
        "maxmemory", 1
    )  # it refuses XADD, with an error that prints the movement
    answers.append(ani.deposit(1))
    eventually(lambda: log_lines(bank.forgetful, "sending to the stream failed"))
    bank.servers.stream.config_set("maxmemory", 0)
    bank.database.audit()  # no lasting harm
    assert [answer.status_code for answer in answers] == [503] * 4 + [200] * 2
    told = "".join(log.read_text() for log in bank.servers.directory.glob("*.log"))
    assert not re.search(
        f"Failing row|{account}", told + "".join(answer.text for answer in answers)
    )


def test_sql_in_any_field_is_text(bank: Bank, account: str, customer: Customers) -> None:
    texts = (
        "'; DROP TABLE rekening; --",
        "' OR '1'='1",
        "$$; SELECT 1; $$",
        "{1}",
        "%(no)s :no \\",
    )
    ani, stream = customer(bank.transaksi.url, account), bank.servers.stream
    for text in texts:
        assert ani.post("/tabung", 1, no_rekening=text).status_code == 400
        assert [ani.deposit(5, idempotency_key=text).status_code for _ in range(2)] == [200] * 2
    assert set(enter(bank.transaksi, account, *texts) + enter(bank.transaksi, texts[0], PIN)) == {
        401
    }
    stream.delete("mutasi:dead-letter")
    for field, text in product(MESSAGE, texts):
        stream.xadd("mutasi", {**MESSAGE, field: text})  # type: ignore[dict-item]
    eventually(lambda: stream.xlen("mutasi:dead-letter") == len(MESSAGE) * len(texts))
    bank.database.audit()
    keys = bank.database("SELECT idempotency_key FROM transaksi WHERE no_rekening = %s", account)
    assert keys == [(text,) for text in texts]
