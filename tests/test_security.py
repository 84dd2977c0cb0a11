"""Who may come in, what the database roles may do, and what errors give away."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from psycopg2.errors import FeatureNotSupported

from conftest import PIN, PIN_HASH, Customer, Servers, eventually, new_servers
from dev.local import Service

WRONG = ("000000", "000001", "000002", "000003", "000004")
LOCK = "UPDATE kredensial SET pin_gagal = 5, terkunci_sampai = now() + %s::interval WHERE no_rekening = %s"
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
    """Servers and services: `transaksi` has two processes, `forgetful` checks every request's PIN."""

    def __init__(self, servers: Servers, directory: Path) -> None:
        (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.directory, self.servers, self.database = directory, servers, servers.database
        self.service = partial(servers.service, "transaksi", environment={"PYTHONPATH": str(directory)})
        # A long time limit, so that it is the queue that turns a flood of guesses away.
        self.transaksi = self.service("--workers", "2", "--request-timeout", "60", "--resend-after", "1")
        self.forgetful = self.service("--auth-cache-ttl", "0")
        self.mutasi = servers.service("mutasi")

    def account(self) -> str:
        """A new account; `comparisons` starts anew."""
        (self.directory / "comparisons").write_text("")
        return self.database.open_account()

    def comparisons(self, pin_hash: str = PIN_HASH) -> list[str]:
        """The process of each comparison with this hash; the default is that of every account."""
        lines = (self.directory / "comparisons").read_text().splitlines()
        return [line.split()[0] for line in lines if pin_hash in line]

    @contextmanager
    def holding_comparisons(self) -> Iterator[None]:
        """Comparisons of the right PIN last as long as the block."""
        file = self.directory / PIN
        try:
            file.touch()
            yield
        finally:
            file.unlink()

    def attempts(self, account: str) -> tuple[Any, ...]:
        """How many are counted, and whether the account is locked."""
        query = "SELECT pin_gagal, terkunci_sampai > now() FROM kredensial WHERE no_rekening = %s"
        return self.database(query, account)[0]

    def told_from_now(self) -> Callable[[], str]:
        """Returns what the services have logged since this call."""
        services = (self.transaksi, self.forgetful, self.mutasi)
        sizes = [(service.log, service.log.stat().st_size) for service in services]
        return lambda: "".join(log.read_bytes()[size:].decode() for log, size in sizes)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    with new_servers() as servers:
        bank = Bank(servers, tmp_path_factory.mktemp("bcrypt"))
        with bank.transaksi, bank.forgetful, bank.mutasi:
            yield bank


def at_once(service: Service, *credentials: tuple[str, str]) -> list[httpx.Response]:
    """The answers to these accounts and PINs, each over a connection of its own, to any process."""
    with ThreadPoolExecutor(len(credentials)) as clients:
        get = partial(httpx.get, f"{service.url}/saldo", timeout=60, verify=False)
        return list(clients.map(lambda pair: get(auth=pair), credentials))


def enter(service: Service, account: str, *pins: str) -> list[int]:
    """The statuses that these PINs get at once."""
    return [answer.status_code for answer in at_once(service, *((account, pin) for pin in pins))]


def test_five_failures_lock_an_account_over_workers_and_a_restart(bank: Bank) -> None:
    transaksi, account = bank.transaksi, bank.account()
    for _ in range(2):  # a right PIN forgets the failures before it
        assert enter(bank.forgetful, account, *WRONG[:4]) == [401] * 4
        assert (enter(bank.forgetful, account, PIN), bank.attempts(account)) == ([200], (0, None))
    assert enter(transaksi, account, *WRONG) == [401] * 5
    row = "SELECT terkunci_sampai - now(), xmin::text, k FROM kredensial k WHERE no_rekening = %s"
    ((left, *before),) = bank.database(row, account)
    assert timedelta(minutes=10) < left <= timedelta(minutes=15)
    assert enter(transaksi, account, PIN, *WRONG) == [401] * 6
    transaksi.stop()
    transaksi.start()
    assert enter(transaksi, account, PIN, *WRONG) == [401] * 6
    assert [*bank.database(row, account)[0][1:]] == before  # attempts during a lock write nothing
    for pin, status, attempts in ((WRONG[0], 401, (6, True)), (PIN, 200, (0, None))):
        bank.database(LOCK, "-1 second", account)
        assert (enter(transaksi, account, pin), bank.attempts(account)) == ([status], attempts)


def test_two_hundred_guesses_at_once_are_five_and_stop_nobody(bank: Bank) -> None:
    account, served = bank.account(), 0
    guesses = [(account, f"{number:06}") for number in range(200)]
    with ThreadPoolExecutor() as pool, Customer(bank.transaksi.url, account).client as owner:
        assert owner.get("/saldo").status_code == 200
        guessing = pool.submit(at_once, bank.transaksi, *guesses)
        while not guessing.done():  # who is remembered goes on, also when the account is locked
            assert owner.get("/saldo").status_code == 200
            served += 1
    assert served > 10
    assert len(bank.comparisons()) == 1 + 5
    assert bank.attempts(account) == (5, True)
    surplus = [answer for answer in guessing.result() if answer.status_code != 401]
    assert {(answer.status_code, answer.headers["Retry-After"]) for answer in surplus} == {(503, "1")}
    assert len(surplus) > 20  # at most 64 wait in a process


def test_attempt_is_counted_first_and_a_login_erases_no_later_one(bank: Bank) -> None:
    account = bank.account()
    with ThreadPoolExecutor() as pool, bank.holding_comparisons():
        login = pool.submit(enter, bank.forgetful, account, PIN)
        eventually(bank.comparisons)
        assert bank.attempts(account) == (1, None)  # bcrypt is still at it
        assert set(enter(bank.transaksi, account, *(f"{number:06}" for number in range(12)))) == {401}
    assert login.result() == [200]
    assert len(bank.comparisons()) == 1 + 4
    assert bank.attempts(account) == (5, True)


def test_equal_first_requests_share_one_comparison_per_process(bank: Bank) -> None:
    account = bank.account()
    assert set(enter(bank.transaksi, account, *[PIN] * 64)) == {200}
    processes = bank.comparisons()
    assert 1 <= len(processes) == len(set(processes)) <= 2
    assert bank.attempts(account) == (0, None)


def test_every_401_is_the_same_after_300_ms_and_one_comparison(bank: Bank) -> None:
    account, locked = bank.account(), bank.account()
    bank.database(LOCK, "1 hour", locked)
    wrong = ((account, WRONG[0]), ("9999999999", PIN), (locked, PIN), (locked, WRONG[0]))
    answers = at_once(bank.transaksi, *wrong, ("malformed", PIN))
    assert min(answer.elapsed for answer in answers) > timedelta(seconds=0.3)
    for answer in answers:
        del answer.headers["Date"]
    faces = [(answer.status_code, answer.headers.multi_items(), answer.content) for answer in answers]
    assert (faces[0][0], faces) == (401, faces[:1] * len(answers))
    assert len(bank.comparisons("")) == len(bank.comparisons("$2b$10$")) == len(wrong)


def test_right_pin_is_remembered_as_long_as_configured(bank: Bank) -> None:
    for service, comparisons in ((bank.transaksi, 1), (bank.forgetful, 3)):
        account = bank.account()
        with Customer(service.url, account).client as client:  # of one process
            assert [client.get("/saldo").status_code for _ in range(3)] == [200] * 3
        assert len(bank.comparisons()) == comparisons
    pin_of_siti = "SELECT pin_hash FROM kredensial WHERE no_rekening = '2345678901'"
    with bank.service("--auth-cache-ttl", "1") as service:
        assert enter(service, account, PIN, "234567") == [200, 401]
        assert enter(service, account, "234567") == [401]
        bank.database(f"UPDATE kredensial SET pin_hash = ({pin_of_siti}) WHERE no_rekening = %s", account)
        assert enter(service, account, "234567") == [200]  # the failure was not remembered
        eventually(lambda: enter(service, account, PIN) == [401])


# a INSERT, c CONNECT, r SELECT, U USAGE, w UPDATE; nobody before "=": PUBLIC
RIGHTS = """
public =U, tabungan transaksi=c, tabungan mutasi=c,
rekening.no_rekening transaksi=r, rekening.saldo transaksi=rw,
kredensial transaksi=r, kredensial.pin_gagal transaksi=w, kredensial.terkunci_sampai transaksi=w,
transaksi transaksi=r, transaksi.no_rekening transaksi=a, transaksi.jenis_transaksi transaksi=a,
transaksi.nominal transaksi=a, transaksi.saldo_akhir transaksi=a, transaksi.idempotency_key transaksi=a,
outbox transaksi=ar, outbox.dikirim_pada transaksi=w, mutasi transaksi=r, mutasi mutasi=r,
mutasi.id_transaksi mutasi=a, mutasi.no_rekening mutasi=a, mutasi.tanggal_transaksi mutasi=a,
mutasi.jenis_transaksi mutasi=a, mutasi.nominal mutasi=a"""
GRANTED = """
SELECT name || ' ' || split_part(acl::text, '/', 1) FROM (
    SELECT relname::text, unnest(relacl) FROM pg_class WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT relname || '.' || attname, unnest(attacl) FROM pg_attribute
        JOIN pg_class c ON c.oid = attrelid WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT proname || '()', unnest(coalesce(proacl, acldefault('f', proowner))) FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace AND prorettype <> 'trigger'::regtype
    UNION ALL SELECT nspname, unnest(nspacl) FROM pg_namespace WHERE nspname !~ '^pg_|^information_schema'
    UNION ALL SELECT datname, unnest(coalesce(datacl, acldefault('d', datdba))) FROM pg_database
        WHERE datallowconn) AS o (name, acl)
WHERE acl::text !~ '^(postgres|pg_database_owner)='"""


def test_roles_have_just_the_rights_that_the_services_need(bank: Bank) -> None:
    expected = RIGHTS.replace("\n", " ").strip().split(", ")
    assert sorted(right for (right,) in bank.database(GRANTED)) == sorted(expected)
    for nothing in (
        "pg_roles WHERE oid IN {} AND (rolsuper OR rolcreatedb OR rolcreaterole OR rolbypassrls)",
        "pg_roles WHERE oid IN {} AND rolreplication",
        "pg_auth_members WHERE member IN {}",
        "pg_shdepend WHERE refobjid IN {} AND deptype = 'o'",  # what they own, in any database
        "pg_proc WHERE prosecdef AND NOT coalesce(proconfig::text ~ 'search_path=', false)",
    ):
        rows = nothing.format("('transaksi'::regrole, 'mutasi'::regrole)")
        assert bank.database(f"SELECT * FROM {rows}") == []


@pytest.mark.parametrize("book", ["transaksi", "mutasi"])
@pytest.mark.parametrize("change", ["UPDATE {} SET nominal = 1", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
def test_books_are_append_only_even_for_their_owner(bank: Bank, book: str, change: str) -> None:
    with pytest.raises(FeatureNotSupported, match="append-only"):
        bank.database(change.format(book))


@pytest.mark.parametrize("sqlstate", ["23514", "P0001"])
@pytest.mark.parametrize("table", ["rekening", "kredensial", "transaksi", "outbox", "mutasi"])
def test_text_of_database_errors_is_told_nowhere(bank: Bank, table: str, sqlstate: str) -> None:
    account, told = bank.account(), bank.told_from_now()
    bank.database(f"""
        CREATE FUNCTION uji() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'bocor %%', NEW
            USING ERRCODE = '{sqlstate}', DETAIL = 'bocor ' || NEW::text; END $$;
        CREATE TRIGGER uji BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION uji()""")
    with closing(Customer(bank.transaksi.url, account)) as customer:
        answer = customer.deposit(1)
        eventually(lambda: re.search('"status": ?503|processing failed|dead letters', told()))
        bank.database("DROP FUNCTION uji() CASCADE")
        assert answer.status_code == (200 if table == "mutasi" else 503)
        eventually(lambda: customer.deposit(1).status_code == 200)  # no lasting harm
    assert "bocor" in bank.servers.postgres.log.read_text()  # the server has told it
    assert not re.search(f"bocor|{account}", told() + answer.text)


def test_text_of_redis_errors_is_told_nowhere(bank: Bank) -> None:
    account, told = bank.account(), bank.told_from_now()
    bank.servers.stream.config_set("maxmemory", 1)  # it refuses XADD, with an error that prints the movement
    with closing(Customer(bank.transaksi.url, account)) as customer:
        assert customer.deposit(1).status_code == 200
    eventually(lambda: "OutOfMemoryError" in told())
    bank.servers.stream.config_set("maxmemory", 0)
    bank.database.audit()
    assert account not in told()


def test_sql_in_any_field_is_text(bank: Bank) -> None:
    texts = ("'; DROP TABLE rekening; --", "' OR '1'='1", "$$; SELECT 1; $$", "{1}", "%(no)s :no \\")
    account, stream = bank.account(), bank.servers.stream
    with closing(Customer(bank.transaksi.url, account)) as customer:
        for text in texts:
            assert customer.post("/tabung", 1, no_rekening=text).status_code == 400
            assert [customer.deposit(5, idempotency_key=text).status_code for _ in range(2)] == [200] * 2
        assert set(enter(bank.transaksi, account, *texts) + enter(bank.transaksi, texts[0], PIN)) == {401}
    good: dict[Any, Any] = {"id_transaksi": 1, "tanggal_transaksi": "2026-01-31T00:00:00Z", "nominal": 5}
    good |= {"no_rekening": account, "jenis_transaksi": "tabung"}
    letters = stream.xlen("mutasi:dead-letter") + len(texts) * len(good)
    for field, text in ((field, text) for field in good for text in texts):
        stream.xadd("mutasi", good | {field: text})
    eventually(lambda: stream.xlen("mutasi:dead-letter") == letters)
    bank.database.audit()
    keys = bank.database("SELECT idempotency_key FROM transaksi WHERE no_rekening = %s", account)
    assert keys == [(text,) for text in texts]
