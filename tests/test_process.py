"""The two processes: options, environment, start and end, log lines."""

import json
import logging
import os
import re
import runpy
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from errno import EADDRINUSE
from functools import partial
from itertools import islice
from typing import IO, Any, cast

import psutil
import psycopg2
import pytest
import sqlalchemy

from common.telemetry import JsonFormatter
from conftest import Customer, Servers, eventually, log_lines, new_servers
from dev.local import HOST, ROOT, Redis, Service
from transaksi.datastore import Base

Customers = Callable[..., Customer]

CHATTY = """import logging, sys, common.telemetry; common.telemetry.start_logging("transaksi", "INFO")
for _ in range(30_000): logging.info("line")
print("done", file=sys.stderr, flush=True); sys.stdin.read(); logging.info("line")"""


@contextmanager
def running(*services: Service) -> Iterator[None]:
    """Run services; SIGTERM must end each with status 0."""
    with ExitStack() as stack:
        for service in services:
            stack.enter_context(service)
        yield
        assert [service.stop(timeout=8) for service in services] == [0] * len(services)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with new_servers() as started:
        yield started


@pytest.fixture(scope="module")
def bank(servers: Servers) -> Iterator[Service]:
    with running(transaksi := servers.service("transaksi")):
        yield transaksi


@pytest.fixture
def ani(servers: Servers, bank: Service, customer: Customers) -> Customer:
    return customer(bank.url, servers.database.open_account())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], Any]:
    """Runs a command line in this process, without secrets; returns its exit status and output."""

    def run(name: str, argument: str) -> Any:
        monkeypatch.setattr(sys, "argv", [name, argument])
        monkeypatch.setenv("DB_USER", "")
        with pytest.raises(SystemExit) as end:
            runpy.run_module(name, run_name="__main__")
        return end.value.code, "".join(capsys.readouterr())

    return run


def test_help_and_documents_list_the_same_options_and_defaults(run: Callable[[str, str], Any]) -> None:
    helps = run("transaksi", "--help")[1] + run("mutasi", "--help")[1]
    options = re.findall(r"^  (--[a-z-]+) [^()]*\(default:\s+(\S*)\)$", helps, re.MULTILINE)
    documents = "".join(file.read_text() for file in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    documented = re.findall(r"^\| `(--[a-z-]+)` \| `([^`]*)` \|", documents, re.MULTILINE)
    assert sorted(set(documented)) == sorted(set(options))
    assert len(options) == 16 + 7


@pytest.mark.parametrize(
    "argument",
    [
        *(f"--{kind}port={port}" for kind in ("", "db-", "redis-") for port in (0, 65536)),
        *(f"--workers={value}" for value in ("0", "65", "-1", "1.5", "two", "", "１")),  # noqa: RUF001
        *("--auth-cache-ttl=3601", "--max-pin-failures=2", "--lock-minutes=0", "--log-level=LOUD"),
        *("--request-timeout=0", "--request-timeout=61", "--max-queue=0", "--max-stream=0"),
        *("--resend-after=0", "--resend-after=3601", "--batch-size=0", "--pin=1", "--po=8000"),
    ],
)
def test_refused_argument_is_a_usage_error(run: Callable[[str, str], Any], argument: str) -> None:
    name, option = "mutasi" if "batch" in argument else "transaksi", argument.partition("=")[0]
    status, output = run(name, argument)
    assert status == 2
    assert re.match(f"usage: python -m {name} (?s:.*) error: .*{option}", output)


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("transaksi", {"DB_USER": ""}, "cannot start: the environment variable DB_USER is missing"),
        ("mutasi", {"DB_PASSWORD": ""}, "cannot start: the environment variable DB_PASSWORD is missing"),
        ("transaksi", {}, f"[Errno {EADDRINUSE}] Address already in use"),
    ],
)
def test_failed_start_is_one_clear_line(servers: Servers, name: str, environment: Any, message: str) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        service = servers.service(name, environment=environment, port=taken.getsockname()[1])
        with pytest.raises(RuntimeError, match=r"ended by itself with status [13]:"):
            service.start()
    (line,) = (line for line in log_lines(service) if line["level"] != "INFO")
    assert (line["level"], line["message"]) == ("CRITICAL" if environment else "ERROR", message)


def test_servers_may_come_late(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "_ready", lambda _: True)
    command_lines = (("transaksi", "--resend-after", "1"), ("mutasi",))
    transaksi, _ = both = [servers.service(*line) for line in command_lines]
    never = [servers.service(*line, "--db-name", "other") for line in command_lines]
    servers.postgres.stop()
    servers.redis.stop()
    with running(*both), running(*never):
        for service in (*both, *never):
            eventually(partial(log_lines, service, "looking for lost movements failed|processing failed"))
        servers.postgres.start()
        servers.redis.start()
        with closing(Customer(transaksi.url, servers.database.open_account())) as ani:
            assert ani.deposit(1).status_code == 200
        servers.database.audit()
    for service in (*both, *never):
        assert log_lines(service)[-1]["message"] == "stopped"


def test_redis_without_password(servers: Servers) -> None:
    with Redis(servers.directory / "open", None, "--requirepass", "") as server:
        mutasi = Servers(servers.directory, servers.postgres, server).service("mutasi")
        with running(mutasi):
            assert not log_lines(mutasi, "processing failed")


def test_workers_and_log_level(servers: Servers, customer: Customers) -> None:
    with running(service := servers.service("transaksi", "--workers", "2", "--log-level", "warning")):
        children = psutil.Process(service.pid).children()
        assert sum("spawn_main" in " ".join(child.cmdline()) for child in children) == 2
        ani = customer(service.url, servers.database.open_account())
        assert [ani.deposit(1).status_code, ani.withdraw(2).status_code] == [200, 400]
    assert {line["level"] for line in log_lines(service)} == {"WARNING"}


def test_settings_are_logged_without_secrets(servers: Servers, bank: Service) -> None:
    (starting,) = log_lines(bank, "starting")
    assert starting.items() >= {"db_port": servers.postgres.port, "max_pin_failures": 5}.items()
    for secret in (servers.redis.password, *servers.postgres.passwords.values()):
        assert secret not in bank.log.read_text()


def test_movement_is_logged_by_both_services(servers: Servers, bank: Service, ani: Customer) -> None:
    assert [ani.deposit(10).status_code for _ in range(5)] == [200] * 5
    eventually(lambda: servers.stream.xlen("mutasi") >= 5)
    with running(mutasi := servers.service("mutasi", "--batch-size", "2", "--log-level", "DEBUG")):
        servers.database.audit()
    accepted, stored = log_lines(bank, "movement accepted")[-1], log_lines(mutasi, "mutation stored")[-1]
    facts = {"no_rekening": f"******{ani.no_rekening[-4:]}", "jenis_transaksi": "tabung", "nominal": 10}
    facts |= {"level": "INFO", "id_transaksi": servers.database("SELECT max(id) FROM transaksi")[0][0]}
    assert stored.items() >= (facts | {"service": "mutasi"}).items()
    assert accepted.items() >= (facts | {"service": "transaksi", "path": "/tabung", "saldo": 50}).items()
    assert accepted["duration_ms"] > 0
    assert max(line["count"] for line in log_lines(mutasi, "batch stored")) == 2


def test_refusal_is_logged_with_its_reason(bank: Service, ani: Customer, customer: Customers) -> None:
    assert ani.withdraw(1).status_code == 400
    assert customer(bank.url, ani.no_rekening, "098765").deposit(1).status_code == 401
    poor, stranger = eventually(lambda: len(seen := log_lines(bank, "request refused")) == 2 and seen)
    for line in (poor, stranger):
        assert (line["level"], line["no_rekening"]) == ("WARNING", f"******{ani.no_rekening[-4:]}")
        assert line["duration_ms"] > 0
    assert (poor["status"], poor["remark"], poor["nominal"]) == (400, "Saldo tidak mencukupi.", 1)
    assert (stranger["status"], stranger["reason"]) == (401, "wrong PIN")


def test_unexpected_error_keeps_its_traceback_and_text_but_not_those_of_its_cause() -> None:
    try:
        raise ValueError("shown") from sqlalchemy.exc.DBAPIError("hidden", {}, psycopg2.Error("hidden"))
    except ValueError:
        record = logging.makeLogRecord({"exc_info": sys.exc_info()})
    exception = json.loads(JsonFormatter("transaksi").format(record))["exception"]
    assert re.fullmatch(f'  File "{__file__}", line (?s:.*)\nValueError: shown', exception)
    assert "hidden" not in exception.replace('"hidden"', "")  # the line of code above


def test_lines_dropped_for_a_slow_reader_are_counted() -> None:
    command, pipe = [sys.executable, "-c", CHATTY], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        stdin, stdout, stderr = (
            cast("IO[bytes]", p) for p in (process.stdin, process.stdout, process.stderr)
        )
        stderr.readline()  # all is logged, and nobody has read stdout
        lines = list(islice(stdout, 10_000))
        stdin.close()  # one more line, for which there is room
        lines += stdout
    assert sum(json.loads(line).get("count", 1) for line in lines) == 30_001
    assert len(lines) < 30_000


def test_unread_stdout_stops_no_movement_and_no_exit(servers: Servers, customer: Customers) -> None:
    os.mkfifo(fifo := servers.directory / "unread")
    reader = os.open(fifo, os.O_RDWR)  # does not wait for a writer
    shell = ["sh", "-c", 'exec "$0" "$@" >"$UNREAD"', sys.executable]
    with running(service := servers.service("transaksi", python=shell, environment={"UNREAD": str(fifo)})):
        ani = customer(service.url, servers.database.open_account())
        while select.select([], [reader], [], 0)[1]:  # until the pipe is full
            assert ani.deposit(1).status_code == 200
        assert [ani.deposit(1).status_code for _ in range(100)] == [200] * 100
    os.close(reader)


def test_mapped_classes_match_init_sql(servers: Servers) -> None:
    def rows(table: sqlalchemy.Table) -> list[Any]:
        return [(c.name, c.type.python_type, c.nullable, c.primary_key) for c in table.columns]

    url = servers.postgres.url().replace("://", "+psycopg2://")
    made = sqlalchemy.MetaData()
    made.reflect(sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool))
    for table in Base.metadata.sorted_tables:
        assert rows(table) == rows(made.tables[table.name])
        foreign = {key.target_fullname for key in made.tables[table.name].foreign_keys}
        assert {key.target_fullname for key in table.foreign_keys} <= foreign
