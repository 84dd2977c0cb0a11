"""Who may come in, what the database roles may do, and what errors give away."""

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from unittest.mock import Mock

import httpx
import pytest

from dev.local import PIN, PIN_HASH, Service
from tests.support import DIRECT, Customer, Servers, eventually, log_lines, running
from transaksi.app import PinCheck

Customers = Callable[..., Customer]
SQL = ("'; DROP TABLE rekening; --", "' OR '1'='1", "$$; SELECT 1; $$", "{1}", "%(no)s :no \\")
GUESSES = [f"{number:06}" for number in range(200)]
LOCK = """UPDATE kredensial SET pin_gagal = 5, terkunci_sampai = now() + %s::interval
    WHERE no_rekening = %s"""
ATTEMPTS = "SELECT pin_gagal, terkunci_sampai > now() FROM kredensial WHERE no_rekening = %s"
# Run by every process at its start: notes each PIN comparison, and holds it while a file exists.
SITECUSTOMIZE = """
import os, time, bcrypt
def noted(password, hashed, checkpw=bcrypt.checkpw):
    open({!r}, "ab", 0).write(b"%d %s\\n" % (os.getpid(), hashed))
    while os.path.exists({!r}):
        time.sleep(0.01)
    return checkpw(password, hashed)
bcrypt.checkpw = noted
"""


class Bank:
    """The services: two instances of transaksi, and one that checks the PIN of each request."""

    def __init__(self, servers: Servers) -> None:
        self.servers, self.database, self.directory = servers, servers.database, servers.directory
        self.hold, self.notes = self.directory / "hold", self.directory / "comparisons"
        # A long timeout, so that the checks under way are the limit of a flood of guesses.
        code = SITECUSTOMIZE.format(str(self.notes), str(self.hold))
        new = partial(servers.patched, code, "--request-timeout", "60", "--resend-after", "1")
        self.first, self.second = self.both = [new(), new()]
        self.uncached = new("--auth-cache-ttl", "0")
        self.brief = new("--auth-cache-ttl", "1")

    def comparisons(self, pin_hash: str = PIN_HASH) -> list[str]:
        """The process of each comparison in this test with this hash, by default all accounts'."""
        lines = self.notes.read_text().splitlines()
        return [line.split()[0] for line in lines if pin_hash in line]


@pytest.fixture(scope="module")
def bank(servers: Servers, url: str) -> Iterator[Bank]:  # noqa: ARG001 - starts service mutasi
    bank = Bank(servers)
    with running(*bank.both, bank.uncached, bank.brief):
        yield bank


@pytest.fixture
def account(bank: Bank) -> Iterator[str]:
    bank.notes.write_text("")
    yield bank.database.open_account()
    bank.hold.unlink(missing_ok=True)


def enter(services: Sequence[Service], account: str, *pins: str) -> list[int]:
    """The statuses that these PINs get at once, from these services in turns."""

    def status(service: Service, pin: str) -> int:
        return httpx.get(f"{service.url}/saldo", auth=(account, pin), **DIRECT).status_code

    with ThreadPoolExecutor(len(pins)) as threads:
        return list(threads.map(status, cycle(services), pins))


def test_five_wrong_pins_over_two_instances_lock_an_account(bank: Bank, account: str) -> None:
    assert enter(bank.both, account, *GUESSES[:5]) == [401] * 5

    assert enter([bank.uncached], account, PIN) == [401]  # which has seen none of them
    ends = "SELECT terkunci_sampai - now() FROM kredensial WHERE no_rekening = %s"
    ((left,),) = bank.database(ends, account)
    assert 10 * 60 < left.total_seconds() <= 15 * 60
    lines = [*log_lines(bank.first, "account locked"), *log_lines(bank.second, "account locked")]
    assert ("WARNING", f"******{account[-4:]}") in {(x["level"], x["no_rekening"]) for x in lines}


def test_correct_pin_resets_the_count(bank: Bank, account: str) -> None:
    assert enter(bank.both, account, *GUESSES[:4]) == [401] * 4
    assert bank.database(ATTEMPTS, account) == [(4, None)]

    assert enter([bank.uncached], account, PIN) == [200]
    assert bank.database(ATTEMPTS, account) == [(0, None)]


def test_lock_costs_no_write(bank: Bank, account: str) -> None:
    bank.database(LOCK, "10 minutes", account)
    version = "SELECT xmin::text FROM kredensial WHERE no_rekening = %s"
    before = bank.database(version, account)

    assert enter(bank.both, account, PIN, *GUESSES[:5]) == [401] * 6

    assert bank.database(version, account) == before


@pytest.mark.parametrize("ends", ["-1 second", "1 hour"])  # over; set by a clock that was ahead
def test_lock_that_is_over_allows_one_attempt(bank: Bank, account: str, ends: str) -> None:
    for pin, status, attempts in (("000000", 401, (6, True)), (PIN, 200, (0, None))):
        bank.database(LOCK, ends, account)
        assert enter([bank.uncached], account, pin) == [status]
        assert bank.database(ATTEMPTS, account) == [attempts]


def test_two_hundred_guesses_at_once_are_five_and_stop_nobody(bank: Bank, account: str) -> None:
    def turned_away() -> int:
        lines = [line for service in bank.both for line in log_lines(service, "request failed")]
        return [line["reason"] for line in lines].count("too many PIN checks")

    def guessed_while_the_owner_goes_on() -> bool:  # his PIN is cached
        assert owner.get("/saldo").status_code == 200
        return guessing.done()

    with ThreadPoolExecutor() as threads, Customer(bank.first.url, account).client as owner:
        assert owner.get("/saldo").status_code == 200
        bank.hold.touch()
        login = threads.submit(enter, [bank.uncached], account, PIN)
        eventually(lambda: len(bank.comparisons()) == 2)
        assert bank.database(ATTEMPTS, account) == [(1, None)]  # counted before it is compared
        guessing = threads.submit(enter, [bank.first] * 19 + [bank.second], account, *GUESSES)
        eventually(lambda: turned_away() == 190 - 64, 60)  # 64 wait in the first instance
        eventually(lambda: bank.database(ATTEMPTS, account) != [(1, None)])
        bank.hold.unlink()  # the login is one of five attempts, and resets none that came after it
        eventually(guessed_while_the_owner_goes_on, 60)

    assert login.result() == [200]
    assert sorted(guessing.result()) == [401] * (64 + 10) + [503] * (190 - 64)
    assert (len(bank.comparisons()), *bank.database(ATTEMPTS, account)) == (2 + 4, (5, True))


def test_cached_pin_expires(bank: Bank, account: str) -> None:
    assert enter([bank.brief], account, PIN) == [200]
    bank.database(LOCK, "10 minutes", account)
    eventually(lambda: enter([bank.brief], account, PIN) == [401])


def test_correct_pin_is_compared_once_in_each_process(bank: Bank, account: str) -> None:
    for _ in range(2):  # at once they share a comparison, later it is cached
        assert enter(bank.both, account, *[PIN] * 64) == [200] * 64
    assert len(bank.comparisons()) == len(set(bank.comparisons())) == 2


def test_without_a_cache_every_pin_is_compared(bank: Bank, account: str) -> None:
    assert [enter([bank.uncached], account, PIN) for _ in range(2)] == [[200], [200]]
    assert len(bank.comparisons()) == 2


def test_shared_check_outlives_the_first_who_asked() -> None:
    async def ask_twice() -> None:
        database, comparison = Mock(), asyncio.get_running_loop().create_future()
        database.run.return_value = comparison
        pins = PinCheck(database, max_failures=5, lock_minutes=15, cache_ttl_s=300)
        first, second = (asyncio.create_task(pins.check("1234567890", PIN)) for _ in range(2))
        await asyncio.sleep(0)

        first.cancel()
        await asyncio.wait([first])
        comparison.set_result(None)
        await second

        database.run.assert_called_once()

    asyncio.run(ask_twice())


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/saldo"), ("GET", "/mutasi"), ("POST", "/tabung"), ("POST", "/tarik")],
)
def test_deleted_account_is_refused_and_out_of_the_cache(
    bank: Bank, account: str, customer: Customers, method: str, path: str
) -> None:
    ani = customer(bank.first.url, account)
    assert ani.balance() == 0  # caches the PIN
    for table in ("kredensial", "rekening"):
        bank.database(f"DELETE FROM {table} WHERE no_rekening = %s", account)

    payload = {"no_rekening": account, "nominal": 1} if method == "POST" else None
    first, second = (ani.client.request(method, path, json=payload) for _ in range(2))

    assert first.status_code == second.status_code == 401
    assert first.json() == second.json() == {"remark": "Nomor rekening atau PIN salah."}
    assert len(bank.comparisons("$2b$")) == 2  # the second was compared again


def test_every_401_is_the_same_after_300_ms_and_one_comparison(bank: Bank, account: str) -> None:
    bank.database(LOCK, "10 minutes", locked := bank.database.open_account())
    wrong = [(account, "000000"), ("9999999999", PIN), (locked, PIN), (locked, "000000")]
    url = f"{bank.first.url}/saldo"

    answers = [httpx.get(url, auth=pair, **DIRECT) for pair in (*wrong, ("malformed", PIN))]

    assert min(answer.elapsed.total_seconds() for answer in answers) > 0.3
    for answer in answers:
        del answer.headers["Date"]
    faces = {(answer.status_code, answer.text, *answer.headers.multi_items()) for answer in answers}
    assert [face[0] for face in faces] == [401]
    assert len(bank.comparisons("")) == len(bank.comparisons("$2b$10$")) == len(wrong)


def test_roles_have_just_the_rights_that_the_services_need(bank: Bank) -> None:
    # a INSERT, c CONNECT, d DELETE, r SELECT, U USAGE, w UPDATE; nobody before "=": PUBLIC
    expected = """public:=U tabungan:transaksi=c tabungan:mutasi=c template0:=c
    rekening.no_rekening:transaksi=r rekening.saldo:transaksi=rw kredensial:transaksi=r
    kredensial.pin_gagal:transaksi=w kredensial.terkunci_sampai:transaksi=w transaksi:transaksi=r
    transaksi.no_rekening:transaksi=a transaksi.jenis_transaksi:transaksi=a
    transaksi.nominal:transaksi=a transaksi.saldo_akhir:transaksi=a
    transaksi.idempotency_key:transaksi=a transaksi.traceparent:transaksi=a
    outbox:transaksi=ar outbox.dikirim_pada:transaksi=w mutasi:transaksi=r
    outbox:mutasi=d outbox.id_transaksi:mutasi=r mutasi:mutasi=r mutasi.id_transaksi:mutasi=a
    mutasi.no_rekening:mutasi=a mutasi.tanggal_transaksi:mutasi=a
    mutasi.jenis_transaksi:mutasi=a mutasi.nominal:mutasi=a"""
    # Of others than the superuser: on objects (ours have oids from 16384 on), on databases, and
    # in general.
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
            SELECT member FROM pg_auth_members
            UNION SELECT refobjid FROM pg_shdepend WHERE deptype = 'o'))
    UNION SELECT proname FROM pg_proc
        WHERE prosecdef AND coalesce(proconfig::text, '') !~ 'search_path='""")
    assert sorted(right for (right,) in rights) == sorted(expected.split())


def test_text_of_server_errors_is_told_nowhere(
    bank: Bank, account: str, customer: Customers
) -> None:
    ani, postgres, answers = customer(bank.uncached.url, account), bank.servers.postgres.log, []
    for table in ("rekening", "kredensial", "transaksi", "outbox", "mutasi"):
        bank.database(f"ALTER TABLE {table} ADD CONSTRAINT uji CHECK (false) NOT VALID")
        size = postgres.stat().st_size
        answers.append(ani.deposit(1))
        eventually(lambda: b"Failing row contains" in postgres.read_bytes()[size:])  # noqa: B023
        bank.database(f"ALTER TABLE {table} DROP CONSTRAINT uji")
    bank.servers.stream.config_set("maxmemory", 1)  # XADD fails: the error prints the movement
    answers.append(ani.deposit(1))
    eventually(lambda: log_lines(bank.uncached, "sending to the stream failed"))
    bank.servers.stream.config_set("maxmemory", 0)

    assert [answer.status_code for answer in answers] == [503] * 4 + [200] * 2
    told = [answer.text for answer in answers]
    told += [log.read_text() for log in bank.directory.glob("*.log")]
    assert not re.search(f"Failing row|{account}", "".join(told))
    bank.database.audit()  # no lasting harm


def test_sql_in_a_request_is_text(bank: Bank, account: str, customer: Customers) -> None:
    ani = customer(bank.first.url, account)
    for text in SQL:
        assert ani.post("/tabung", 1, no_rekening=text).status_code == 400
        assert [ani.deposit(5, idempotency_key=text).status_code for _ in range(2)] == [200] * 2
    assert set(enter([bank.first], account, *SQL) + enter([bank.first], SQL[0], PIN)) == {401}

    keys = bank.database("SELECT idempotency_key FROM transaksi WHERE no_rekening = %s", account)
    assert keys == [(text,) for text in SQL]
