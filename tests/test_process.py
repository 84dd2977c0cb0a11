"""The two processes: their arguments and environment, how they start and end, and what they write.

`--request-timeout` is shown in test_contract.py, and in test_faults.py like `--max-queue`, `--max-stream` and
`--reconcile-after`. That no log line of the whole test run gives away a secret is looked at in conftest.py.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from errno import EADDRINUSE
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy
from sqlalchemy.pool import NullPool

import mutasi.datastore
import transaksi.datastore
from conftest import PIN_HASH, Nasabah, Servers, eventually, flaw_of, log_lines, new_servers
from dev.local import HOST, ROOT, Redis, Service, free_port
from mutasi.__main__ import main as start_mutasi
from transaksi.__main__ import read_settings

BOTH = ["--db-host", "--db-port", "--db-name", "--redis-host", "--redis-port", "--log-level"]
OF = {
    "transaksi": [
        *BOTH,
        *("--host", "--port", "--workers", "--auth-cache-ttl", "--max-pin-failures", "--lock-minutes"),
        *("--request-timeout", "--max-queue", "--max-stream", "--reconcile-after"),
    ],
    "mutasi": [*BOTH, "--batch-size"],
}


class Unawaited(Service):
    """Counts as started from the first moment."""

    def _ready(self) -> bool:
        return True


@contextmanager
def running(*services: Service) -> Iterator[None]:
    """Run services that must stop in good order."""
    with ExitStack() as stack:
        for service in services:
            stack.enter_context(service)
        yield
        assert [service.stop(timeout=8) for service in services] == [0] * len(services)


def lines_of_one_that_gives_up(service: Service) -> list[dict[str, Any]]:
    with pytest.raises(RuntimeError, match="ended by itself with status 1:"):
        service.start()
    return log_lines(service)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """Servers on which nothing runs but what a test starts."""
    with new_servers() as started:
        yield started


# ---------------------------------------------------------------- arguments


def options_of(name: str) -> dict[str, str]:
    """The options of a service and their defaults, as --help shows them."""
    command = [sys.executable, "-m", name, "--help"]
    shown = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "999"}, capture_output=True, text=True, check=True
    )
    return dict(re.findall(r"^ +(--[a-z-]+) X +.*\(default: (.*)\)$", shown.stdout, re.MULTILINE))


def test_help_and_readme_show_every_option_with_its_default() -> None:
    shown = {name: options_of(name) for name in OF}
    assert {name: list(options) for name, options in shown.items()} == OF
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `([^`]*)` \|", Path(ROOT, "README.md").read_text(), re.MULTILINE)
    assert set(rows) == {option for options in shown.values() for option in options.items()}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, value) for option in ("--port", "--db-port", "--redis-port") for value in ("0", "65536")),
        *(("--workers", value) for value in ("0", "65", "-1", "1.5", "two", "", "１")),  # noqa: RUF001
        ("--auth-cache-ttl", "3601"),
        ("--max-pin-failures", "0"),
        ("--lock-minutes", "0"),
        ("--request-timeout", "0"),
        ("--request-timeout", "61"),
        ("--max-queue", "0"),
        ("--max-stream", "0"),
        ("--reconcile-after", "1"),
        ("--log-level", "LOUD"),
        ("--batch-size", "0"),
        ("--pin", "1"),
        ("--po", "8000"),
    ],
)
def test_a_refused_value_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["", option, value])
    with pytest.raises(SystemExit) as end:
        start_mutasi() if option == "--batch-size" else read_settings()
    assert end.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("usage: python -m ")
    assert option in complaint.rpartition("error: ")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has more than one loopback address")
def test_host_is_the_address_it_listens_on(servers: Servers) -> None:
    for host, listens in (("0.0.0.0", True), (HOST, False)):
        service = servers.service("transaksi", "--host", host)
        elsewhere = f"http://127.0.0.2:{service.port}/health"
        with running(service):
            if listens:
                assert httpx.get(elsewhere).status_code == 200
            else:
                with pytest.raises(httpx.ConnectError):
                    httpx.get(elsewhere)


def test_a_port_that_is_taken_is_one_clear_line(servers: Servers) -> None:
    first = servers.service("transaksi")
    second = Unawaited("transaksi", servers.postgres, servers.redis, directory=servers.directory, port=first.port)
    with running(first):
        second.start()
        eventually(lambda: not second.running)
        assert second.stop() != 0
    (complaint,) = (entry for entry in log_lines(second) if entry["level"] == "ERROR")
    assert complaint["message"] == f"[Errno {EADDRINUSE}] Address already in use"


def test_workers_are_so_many_processes(servers: Servers) -> None:
    service = servers.service("transaksi", "--workers", "3")
    with running(service):
        eventually(lambda: len(log_lines(service, r"Started server process \[\d+\]")) == 3)
        pids = {entry["message"] for entry in log_lines(service, "Started server process.*")}
        assert len(pids) == 3


def test_a_right_pin_is_remembered_for_auth_cache_ttl(servers: Servers, nasabah: Callable[..., Nasabah]) -> None:
    a_while, a_second, never = (servers.service("transaksi", "--auth-cache-ttl", ttl) for ttl in ("3600", "1", "0"))
    other = "(SELECT pin_hash FROM kredensial WHERE no_rekening = '2345678901')"
    with running(a_while, a_second, never):
        ani = {s: nasabah(s.url, servers.database.open_account()) for s in (a_while, a_second, never)}
        for customer in ani.values():
            assert customer.tabung(1).status_code == 200
        servers.database(f"UPDATE kredensial SET pin_hash = {other} WHERE pin_hash = %s", PIN_HASH)
        assert ani[never].tabung(1).status_code == 401
        eventually(lambda: ani[a_second].tabung(1).status_code == 401)
        assert ani[a_while].tabung(1).status_code == 200


def test_max_pin_failures_in_a_row_lock_for_lock_minutes(servers: Servers, nasabah: Callable[..., Nasabah]) -> None:
    service = servers.service("transaksi", "--max-pin-failures", "2", "--lock-minutes", "7")
    no_rekening = servers.database.open_account()
    minutes = "SELECT extract(epoch FROM terkunci_sampai - clock_timestamp())::float8 / 60 FROM kredensial"
    query = f"{minutes} WHERE no_rekening = %s"
    with running(service):
        stranger, ani = nasabah(service.url, no_rekening, "098765"), nasabah(service.url, no_rekening)
        assert stranger.tabung(1).status_code == 401
        assert servers.database(query, no_rekening) == [(None,)]
        assert stranger.tabung(1).status_code == 401
        ((left,),) = servers.database(query, no_rekening)
        assert 6 < left <= 7
        assert ani.tabung(1).status_code == 401
    assert [entry["level"] for entry in log_lines(service, "account locked")] == ["WARNING"]


def test_batch_size_is_what_one_transaction_stores(servers: Servers, nasabah: Callable[..., Nasabah]) -> None:
    transaksi = servers.service("transaksi")
    mutasi = servers.service("mutasi", "--batch-size", "2", "--log-level", "DEBUG")
    with running(transaksi), servers.stream as stream:
        ani = nasabah(transaksi.url, servers.database.open_account())
        for _ in range(5):
            assert ani.tabung(1).status_code == 200
        eventually(lambda: servers.database("SELECT count(*) FROM outbox") == [(0,)])
        waiting: Any = stream.xlen("mutasi")
        with running(mutasi):
            servers.database.audit()
    stored = [entry["jumlah"] for entry in log_lines(mutasi, "batch stored")]
    assert (max(stored), sum(stored)) == (2, waiting)


def test_log_level_leaves_out_what_is_below_it(servers: Servers, nasabah: Callable[..., Nasabah]) -> None:
    service = servers.service("transaksi", "--log-level", "warning")
    with running(service):
        ani = nasabah(service.url, servers.database.open_account())
        assert [ani.tabung(1).status_code, ani.tarik(2).status_code] == [200, 400]
    assert [entry["level"] for entry in log_lines(service)] == ["WARNING"]


# ---------------------------------------------------------------- what it needs to start


@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize("missing", ["DB_USER", "DB_PASSWORD"])
def test_a_missing_secret_is_one_clear_line(servers: Servers, name: str, missing: str) -> None:
    (entry,) = lines_of_one_that_gives_up(servers.service(name, environment={missing: ""}))
    assert entry["level"] == "CRITICAL"
    assert entry["message"] == f"cannot start: the environment variable {missing} is missing"


IMPATIENT = (
    "import runpy, servers, sys; servers.START_LIMIT_S = 0.1; sys.argv = sys.argv[2:]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
NOWHERE = str(free_port())


@pytest.mark.parametrize(
    "python", [[sys.executable, "-c", IMPATIENT], pytest.param([sys.executable], marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    ("name", "option", "value", "server"),
    [
        ("transaksi", "--db-host", "127.0.0.9", "PostgreSQL"),
        ("mutasi", "--db-port", NOWHERE, "PostgreSQL"),
        ("transaksi", "--db-name", "lain", "PostgreSQL"),
        ("mutasi", "--redis-host", "127.0.0.9", "Redis"),
        ("mutasi", "--redis-port", NOWHERE, "Redis"),
    ],
)
def test_a_server_that_does_not_come_is_waited_for_and_then_one_clear_line(
    servers: Servers, python: list[str], name: str, option: str, value: str, server: str
) -> None:
    service = servers.service(name, option, value, python=python)
    starting, waiting, end = lines_of_one_that_gives_up(service)
    assert starting["message"] == "starting"
    assert (waiting["level"], waiting["message"]) == ("WARNING", f"waiting for {server}")
    assert (end["level"], end["message"]) == ("CRITICAL", f"cannot start: {server} does not answer")
    assert value in waiting["detail"]
    assert value in end["detail"]


@pytest.mark.parametrize("name", OF)
def test_one_that_still_waits_may_be_stopped(servers: Servers, name: str) -> None:
    service = Unawaited(name, servers.postgres, servers.redis, "--db-name", "lain", directory=servers.directory)
    with running(service):
        eventually(lambda: log_lines(service, "waiting for PostgreSQL"))


@pytest.mark.parametrize("name", OF)
def test_a_server_that_is_merely_late_is_waited_for(servers: Servers, name: str) -> None:
    service = Unawaited(name, servers.postgres, servers.redis, directory=servers.directory)
    late = servers.postgres if name == "transaksi" else servers.redis
    late.stop()
    try:
        with running(service):
            eventually(lambda: log_lines(service, f"waiting for {late.name}"))
            late.start()
            eventually(lambda: log_lines(service, "Application startup complete.|started"))
    finally:
        if not late.running:
            late.start()


def test_redis_may_be_without_a_password(servers: Servers) -> None:
    with Redis(servers.directory / "open", None, "--requirepass", "") as redis:
        mutasi = Service(
            "mutasi", servers.postgres, redis, directory=servers.directory, environment={"REDIS_PASSWORD": ""}
        )
        with running(mutasi):
            assert [entry["level"] for entry in log_lines(mutasi)] == ["INFO", "INFO"]


@pytest.mark.parametrize("mapped", [transaksi.datastore.Base, mutasi.datastore.Base])
def test_the_mapped_classes_say_what_init_sql_says(servers: Servers, mapped: Any) -> None:
    def columns(table: sqlalchemy.Table) -> dict[str, Any]:
        return {c.name: (c.type.python_type, c.nullable, c.primary_key) for c in table.columns}

    found = sqlalchemy.MetaData()
    engine = sqlalchemy.create_engine(servers.postgres.url().replace("://", "+psycopg2://"), poolclass=NullPool)
    found.reflect(engine)
    for table in mapped.metadata.sorted_tables:
        assert columns(table) == columns(found.tables[table.name])
        assert {f.target_fullname for f in table.foreign_keys} <= {
            f.target_fullname for f in found.tables[table.name].foreign_keys
        }


# ---------------------------------------------------------------- what is written


def test_a_movement_is_told_by_both_with_its_context(servers: Servers, nasabah: Callable[..., Nasabah]) -> None:
    transaksi, mutasi = servers.service("transaksi", "--log-level", "DEBUG"), servers.service("mutasi")
    no_rekening = servers.database.open_account(500)
    with running(transaksi, mutasi):
        assert nasabah(transaksi.url, no_rekening).tarik(200).status_code == 200
        servers.database.audit()
    ((id_transaksi,),) = servers.database("SELECT max(id) FROM transaksi")
    known = {"no_rekening": f"******{no_rekening[-4:]}", "jenis_transaksi": "tarik", "nominal": 200}
    known |= {"id_transaksi": id_transaksi, "level": "INFO"}
    (accepted,) = log_lines(transaksi, "movement accepted")
    (stored,) = [entry for entry in log_lines(mutasi, "mutation stored") if entry["id_transaksi"] == id_transaksi]
    assert accepted.items() >= (known | {"saldo": 300, "path": "/tarik", "service": "transaksi"}).items()
    assert accepted["duration_ms"] > 0
    assert stored.items() >= (known | {"service": "mutasi"}).items()


def test_a_refusal_is_a_warning_that_says_whom_and_why(servers: Servers, nasabah: Callable[..., Nasabah]) -> None:
    service = servers.service("transaksi")
    no_rekening = servers.database.open_account()
    with running(service):
        ani = nasabah(service.url, no_rekening)
        assert ani.tarik(1).status_code == 400
        assert ani.post("/tabung", 1, no_rekening="1234567890").status_code == 400
        assert nasabah(service.url, no_rekening, "098765").tabung(1).status_code == 401
    poor, not_his, stranger = log_lines(service, "request refused")
    masked = f"******{no_rekening[-4:]}"
    for entry in (poor, not_his, stranger):
        assert (entry["level"], entry["no_rekening"]) == ("WARNING", masked)
        assert entry["duration_ms"] > 0
    assert (poor["status"], poor["remark"], poor["nominal"]) == (400, "Saldo tidak mencukupi.", 1)
    assert (not_his["status"], not_his["no_rekening_payload"]) == (400, "******7890")
    assert (stranger["status"], stranger["cause"]) == (401, "wrong PIN")


@pytest.mark.parametrize("name", OF)
def test_the_settings_are_told_at_the_start_without_the_secrets(servers: Servers, name: str) -> None:
    service = servers.service(name)
    with running(service):
        starting = log_lines(service)[0]
        assert starting["message"] == "starting"
    assert {option[2:].replace("-", "_") for option in OF[name]} <= starting.keys()
    assert (starting["db_port"], starting["log_level"]) == (servers.postgres.port, "INFO")
    secrets = {servers.redis.password, *servers.postgres.passwords.values()}
    assert not any(secret in service.log.read_text() for secret in secrets)
    assert log_lines(service)[-1]["message"] == "stopped"


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (("}", ""), "no JSON"),
        (('"level": "INFO", ', ""), "no level"),
        (("123Z", "123+00:00"), "no timestamp"),
        (("kita", "kita (PIN 234567)"), "a PIN"),
        (("kita", "kita MTIzNDU2Nzg5MDoxMjM0NTY="), "a PIN in base64"),
        (("kita", "Basic MDAwMDAwMDAwMDowMDAwMDA="), "a header"),
        (("kita", PIN_HASH), "a hash"),
        (("kita", "1234567890"), "an account number"),
    ],
)
def test_the_look_at_each_log_line_sees_what_is_wrong(damage: tuple[str, str], flaw: str) -> None:
    line = (
        '{"timestamp": "2026-01-02T03:04:05.123Z", "level": "INFO", "message": "kita", "service": "mutasi", '
        '"logger": "mutasi.app", "no_rekening": "****7890", "nominal": 123456, "span_id": "1234567890123456"}'
    )
    assert flaw_of(line) is None
    assert flaw_of(line.replace(*damage)) == flaw


def test_a_stdout_that_nobody_reads_stops_no_movement_and_no_exit(
    servers: Servers, nasabah: Callable[..., Nasabah]
) -> None:
    fifo = servers.directory / "unread"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR)  # a pipe may be opened so by one who does not wait for a writer
    try:
        service = servers.service(
            "transaksi",
            python=["sh", "-c", 'exec "$0" "$@" >"$UNREAD"', sys.executable],
            environment={"UNREAD": str(fifo)},
        )
        service.start()
        ani = nasabah(service.url, servers.database.open_account())
        while select.select([], [reader], [], 0)[1]:
            assert ani.tabung(1).status_code == 200
        assert [ani.tabung(1).status_code for _ in range(100)] == [200] * 100
        assert service.stop(timeout=8) == 0
    finally:
        os.close(reader)
        service.stop(signal.SIGKILL)


def test_lines_that_a_slow_stdout_has_no_room_for_are_counted() -> None:
    program = (
        "import logging, sys, telemetry; telemetry.start_logging('uji', 'INFO');"
        "[logging.info('baris') for _ in range(30_000)]; print('done', file=sys.stderr, flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stderr.readline() == "done\n"  # and nobody has read yet
        written = 0
        for line in process.stdout:
            entry = json.loads(line)
            if entry["message"] != "baris":
                break
            written += 1
        assert (entry["level"], entry["jumlah"]) == ("WARNING", 30_000 - written)
        assert written < 30_000
        process.stdin.close()
        assert process.wait(timeout=20) == 0
