"""The two processes: options, environment, start and end, log lines."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import psycopg2
import pytest
import sqlalchemy

from common.telemetry import JsonFormatter
from dev.local import ROOT, Service
from tests.support import Customer, Servers, eventually, log_lines, new_servers
from transaksi.datastore import Base

Bank = tuple[Servers, list[Service]]
Customers = Callable[..., Customer]

CHATTY = """
import logging, sys, common.telemetry
common.telemetry.start_logging("transaksi", "INFO")
for _ in range(30_000):
    logging.info("line")
print("nobody has read a line", file=sys.stderr, flush=True)
logging.getLogger().handlers[0].queue.join()  # until all are read
logging.info("line")
"""


@pytest.fixture(scope="module")
def bank() -> Iterator[Bank]:
    """Both services, which started before their servers, as did two whose database never comes."""
    with new_servers() as servers, ExitStack() as stack:
        new = partial(servers.service, environment={"REDIS_PASSWORD": ""})
        services = [
            new("transaksi", "--workers", "2", "--resend-after", "1"),
            new("mutasi", "--batch-size", "2", "--log-level", "debug"),
            *(new(name, "--db-name", "never") for name in ("transaksi", "mutasi")),
        ]
        servers.postgres.stop()
        servers.redis.stop()
        with patch.object(Service, "_ready", return_value=True):  # do not wait for it
            for service in services:
                stack.enter_context(service)
        eventually(lambda: all(log_lines(service, ".* failed") for service in services), 60)
        servers.postgres.start()
        servers.redis.start()
        servers.stream.config_set("requirepass", "")
        eventually(services[0]._ready)
        yield servers, services


def test_help_and_documents_list_the_same_options(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("transaksi", "mutasi"):
        with patch.object(sys, "argv", [name, "--help"]), pytest.raises(SystemExit, match="0"):
            runpy.run_module(name, run_name="__main__")
    line, row = r"^  (--[a-z-]+) [^()]*\(default:\s+(\S*)\)$", r"^\| `(--[a-z-]+)` \| `([^`]*)` \|"
    told = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    documents = "".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    assert sorted(re.findall(row, documents, re.MULTILINE)) == sorted(set(told))
    assert len(told) == 16 + 7


def test_refused_argument_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    ports = [f"--port={value}" for value in ("0", "65536", "-1", "1.5", "", "\uff11")]
    for argument in (*ports, "--log-level=LOUD", "--pin=1", "--po=8000"):
        with patch.object(sys, "argv", ["", argument]), pytest.raises(SystemExit, match="2"):
            runpy.run_module("transaksi", run_name="__main__")
        told = f"usage: python -m transaksi (?s:.*) error: .*{argument.partition('=')[0]}"
        assert re.match(told, capsys.readouterr().err), argument


def test_failed_start_is_one_clear_line(servers: Servers) -> None:
    for name, lack, line in (
        ("transaksi", "DB_USER", "CRITICAL.*: the environment variable DB_USER is missing"),
        ("mutasi", "DB_PASSWORD", "CRITICAL.*: the environment variable DB_PASSWORD is missing"),
        ("transaksi", "a port", "ERROR.* Address already in use"),
    ):
        service = servers.service(name, environment={lack: ""}, port=servers.postgres.port)
        told = rf'^{name} ended by itself with status [13]:\n(.*"starting".*\n)?.*{line}".*$'
        with pytest.raises(RuntimeError, match=told):
            service.start()


def test_services_recover_and_log_settings_movements_and_refusals(
    bank: Bank, customer: Customers
) -> None:
    """They started before their servers, and have no password for Redis, which asks for none."""
    servers, (transaksi, mutasi, *_) = bank
    ani = customer(transaksi.url, servers.database.open_account())
    with servers.database.holding("LOCK mutasi IN SHARE MODE"):  # so that they wait for mutasi
        assert [ani.deposit(10).status_code for _ in range(5)] == [200] * 5
        eventually(lambda: servers.stream.xlen("mutasi") >= 5)
    servers.database.audit()
    assert ani.withdraw(51).status_code == 400
    assert customer(transaksi.url, ani.no_rekening, "098765").deposit(1).status_code == 401
    eventually(lambda: len(log_lines(transaksi, "request refused")) == 2)
    who = {"no_rekening": f"******{ani.no_rekening[-4:]}"}
    deposit = who | {"level": "INFO", "jenis_transaksi": "tabung", "nominal": 10}
    deposit |= {"id_transaksi": servers.database("SELECT max(id) FROM transaksi")[0][0]}
    lines = [*log_lines(transaksi), *log_lines(mutasi)]
    for facts in (
        {"message": "starting", "db_port": servers.postgres.port, "max_pin_failures": 5},
        deposit | {"message": "movement accepted", "path": "/tabung", "saldo": 50},
        deposit | {"message": "mutation stored", "service": "mutasi"},
        who
        | {"level": "WARNING", "status": 400, "remark": "Saldo tidak mencukupi.", "nominal": 51},
        who | {"level": "WARNING", "status": 401, "reason": "wrong PIN"},
    ):
        assert sum(line.items() >= facts.items() for line in lines) == 1, facts
    assert min(line["duration_ms"] for line in lines if "path" in line) > 0
    assert max((line["level"], line["count"]) for line in log_lines(mutasi, "batch stored")) == (
        "DEBUG",
        2,
    )
    assert "DEBUG" not in {line["level"] for line in log_lines(transaksi)}


def test_workers_are_processes_and_all_stop_in_order(bank: Bank) -> None:
    """The last test of `bank`."""
    assert [service.stop(timeout=8) for service in bank[1]] == [0] * 4
    assert [len(log_lines(service, "stopped")) for service in bank[1]] == [2, 1, 1, 1]


def test_unexpected_error_is_told_without_its_cause() -> None:
    with pytest.raises(ValueError, match="shown") as caught:
        raise ValueError("shown") from sqlalchemy.exc.DBAPIError(
            "hidden", {}, psycopg2.Error("hidden")
        )
    told = JsonFormatter().formatException((caught.type, caught.value, caught.tb))
    assert re.fullmatch(f'  File "{__file__}", line (?s:.*)\nValueError: shown', told)
    assert "hidden" not in told.replace('"hidden"', "")  # the line of code above


def test_lines_dropped_for_a_slow_reader_are_counted() -> None:
    command, pipe = [sys.executable, "-c", CHATTY], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe) as process:
        assert process.stderr  # for mypy
        process.stderr.readline()
        lines = [json.loads(line) for line in process.communicate()[0].splitlines()]
    assert len(lines) + sum(line.get("lines_dropped", 0) for line in lines) == 30_001
    assert len(lines) < 30_000


def test_unread_stdout_stops_no_movement_and_no_exit(servers: Servers, customer: Customers) -> None:
    os.mkfifo(fifo := servers.directory / "unread")
    pipe = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    os.write(pipe, bytes(10**6))  # as much as it holds
    shell = ["sh", "-c", f'exec "$0" "$@" >"{fifo}"', sys.executable]
    with servers.service("transaksi", "--workers", "2", python=shell) as service:
        ani = customer(service.url, servers.database.open_account())
        assert [ani.deposit(1).status_code for _ in range(100)] == [200] * 100
        assert service.stop(timeout=8) == 0
    os.close(pipe)


def test_mapped_classes_match_init_sql(servers: Servers) -> None:
    def rows(metadata: sqlalchemy.MetaData) -> list[Any]:
        columns = [column for table in metadata.sorted_tables for column in table.columns]
        return [(str(c), c.type.python_type, c.nullable, c.primary_key) for c in columns]

    url, made = servers.postgres.url().replace("://", "+psycopg2://"), sqlalchemy.MetaData()
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    made.reflect(engine, only=list(Base.metadata.tables))
    assert rows(Base.metadata) == rows(made)
