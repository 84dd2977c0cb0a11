"""The two processes: options, environment, start and end, log lines, mapped classes."""

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
from sqlalchemy import Column, MetaData, NullPool, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase

from common.telemetry import format_error
from dev.local import ROOT, Service
from mutasi import datastore as mutasi_datastore
from tests.support import Customer, Servers, eventually, log_line, log_lines, new_servers
from transaksi import datastore as transaksi_datastore

Bank = tuple[Servers, list[Service]]
Customers = Callable[..., Customer]


@pytest.fixture(scope="module")
def bank() -> Iterator[Bank]:
    """Both services, which started before their servers, and both with passwords that are refused.

    The first two have no password for Redis, which asks for none.
    """
    refused = {"DB_PASSWORD": "postgres-dev", "REDIS_PASSWORD": "redis-dev"}
    with new_servers() as servers, ExitStack() as stack:
        new = partial(servers.service, environment={"REDIS_PASSWORD": ""})
        services = [
            new("transaksi", "--resend-after", "1"),
            new("mutasi", "--log-level", "debug"),
            *(servers.service(name, environment=refused) for name in ("transaksi", "mutasi")),
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
        eventually(services[0]._ready, 60)
        yield servers, services


@pytest.fixture
def ani(bank: Bank, customer: Customers) -> Customer:
    servers, (transaksi, *_) = bank
    return customer(transaksi.url, servers.database.open_account(50))


def test_help_and_readme_list_the_same_options(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("transaksi", "mutasi"):
        with patch.object(sys, "argv", [name, "--help"]), pytest.raises(SystemExit, match="0"):
            runpy.run_module(name, run_name="__main__")
    option = r"^  (--[a-z-]+) [^()]*\(default:\s+(\S*)\)$"
    row = r"^\| `(--[a-z-]+)` \| `([^`]*)` \|"
    told = re.findall(option, capsys.readouterr().out, re.MULTILINE)

    assert len(told) == 13 + 6
    readme = (ROOT / "README.md").read_text()
    assert sorted(re.findall(row, readme, re.MULTILINE)) == sorted(set(told))


PORTS = [f"--port={value}" for value in ("0", "65536", "-1", "1.5", "", "\uff11")]


@pytest.mark.parametrize("argument", [*PORTS, "--log-level=LOUD", "--pin=1", "--po=8000"])
def test_a_refused_argument_is_a_usage_error(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.object(sys, "argv", ["", argument]), pytest.raises(SystemExit, match="2"):
        runpy.run_module("transaksi", run_name="__main__")

    told = f"usage: python -m transaksi (?s:.*) error: .*{argument.partition('=')[0]}"
    assert re.match(told, capsys.readouterr().err)


@pytest.mark.parametrize(("name", "secret"), [("transaksi", "DB_USER"), ("mutasi", "DB_PASSWORD")])
def test_a_missing_secret_is_one_clear_line(name: str, secret: str) -> None:
    environment = os.environ | {"DB_USER": name, "DB_PASSWORD": "x"} | {secret: ""}
    command = [sys.executable, "-m", name]

    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )

    told = f"cannot start: the environment variable {secret} is missing\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", told)


def test_a_port_that_is_taken_ends_the_service_with_one_line(servers: Servers) -> None:
    service = servers.service("transaksi", port=servers.postgres.port)

    with pytest.raises(RuntimeError, match=r"by itself with status [13]:"):
        service.start()

    (error,) = [entry for entry in log_lines(service) if entry["level"] == "ERROR"]
    assert error["message"].lower().endswith("address already in use")


def test_a_development_password_is_a_warning(bank: Bank) -> None:
    for service in bank[1][2:]:
        lines = log_lines(service, "development password in use")
        told = [(line["level"], line["variable"]) for line in lines]
        assert told == [("WARNING", "DB_PASSWORD"), ("WARNING", "REDIS_PASSWORD")]


def test_services_that_started_before_their_servers_recover(bank: Bank, ani: Customer) -> None:
    assert ani.deposit(1).status_code == 200
    bank[0].database.audit()


def test_settings_are_logged_at_the_start(bank: Bank) -> None:
    servers, (transaksi, mutasi, *_) = bank
    shared = {"db_host": "127.0.0.1", "db_port": servers.postgres.port, "db_name": "tabungan"}

    log_line(transaksi, message="starting", level="INFO", max_pin_failures=5, **shared)
    log_line(mutasi, message="starting", level="INFO", log_level="DEBUG", **shared)
    assert log_lines(transaksi, "development password.*") == []


def test_a_movement_is_logged_by_both_services(bank: Bank, ani: Customer) -> None:
    servers, (transaksi, mutasi, *_) = bank
    traceparent = f"00-{'1' * 32}-{'2' * 16}-01"  # which counts for nothing without tracing
    assert ani.deposit(10, traceparent=traceparent).status_code == 200
    journal = "SELECT id, tanggal_transaksi, traceparent FROM transaksi WHERE nominal = 10"
    ((number, moment, trace),) = servers.database(journal)
    assert trace is None
    movement = {"jenis_transaksi": "tabung", "nominal": 10, "id_transaksi": number}
    movement |= {"no_rekening": f"******{ani.no_rekening[-4:]}"}

    answered = log_line(transaksi, id_transaksi=number)
    stored = log_line(mutasi, id_transaksi=number)

    assert (answered.pop("service"), answered.pop("duration_ms") > 0) == ("transaksi", True)
    what = {"method": "POST", "path": "/tabung", "status": 200}
    what |= {"outcome": "accepted", "saldo": 60}
    assert answered == what | movement | {"message": "request answered", "level": "INFO"}
    assert stored.pop("tanggal_transaksi").replace("Z", "+00:00") == moment.isoformat()
    what = {"service": "mutasi", "message": "mutation stored", "level": "INFO"}
    assert stored == what | movement


def test_refusals_are_warnings(bank: Bank, ani: Customer, customer: Customers) -> None:
    _, (transaksi, *_) = bank
    thief = customer(transaksi.url, ani.no_rekening, "098765")
    assert (ani.withdraw(51).status_code, thief.deposit(1).status_code) == (400, 401)
    refused = {"no_rekening": f"******{ani.no_rekening[-4:]}", "message": "request refused"}

    refusal = log_line(transaksi, **refused, status=400)
    guess = log_line(transaksi, **refused, status=401)

    assert (refusal["level"], refusal["reason"]) == ("WARNING", "insufficient balance")
    assert (refusal["remark"], refusal["nominal"]) == ("Saldo tidak mencukupi.", 51)
    assert (guess["level"], guess["reason"]) == ("WARNING", "wrong PIN")


def test_a_5xx_is_an_error(bank: Bank, ani: Customer, customer: Customers) -> None:
    _, (*_, never, _) = bank
    assert customer(never.url, ani.no_rekening).deposit(1).status_code == 503

    assert log_line(never, message="request failed", status=503)["level"] == "ERROR"


def test_debug_lines_are_logged_if_asked_for(bank: Bank, ani: Customer) -> None:
    _, (transaksi, mutasi, *_) = bank
    assert ani.deposit(1).status_code == 200

    assert eventually(lambda: log_lines(mutasi, "batch processed"))[0]["level"] == "DEBUG"
    assert "DEBUG" not in {entry["level"] for entry in log_lines(transaksi)}


def test_services_stop_in_order_even_without_their_database(bank: Bank) -> None:
    """The last test of `bank`."""
    _, services = bank
    assert [service.stop(timeout=8) for service in services] == [0] * 4
    assert [len(log_lines(service, "stopped")) for service in services] == [1] * 4


def test_an_unexpected_error_is_logged_without_its_cause() -> None:
    with pytest.raises(ValueError, match="shown") as caught:
        raise ValueError("shown") from DBAPIError("hidden", {}, psycopg2.Error("hidden"))

    error = (caught.type, caught.value, caught.tb)
    told = format_error(None, "", {"exc_info": error})["error"]

    assert re.fullmatch(f'  File "{__file__}", line (?s:.*)\nValueError: shown', told)
    assert "hidden" not in told.replace('"hidden"', "")  # the line of code above


@pytest.mark.parametrize("base", [transaksi_datastore.Base, mutasi_datastore.Base])
def test_mapped_classes_agree_with_init_sql(servers: Servers, base: type[DeclarativeBase]) -> None:
    def form(column: Column[Any]) -> tuple[Any, ...]:
        kind = column.type
        details = (getattr(kind, "timezone", None), getattr(kind, "enums", None))
        return kind.python_type, *details, column.nullable, column.primary_key

    url = servers.postgres.url().replace("://", "+psycopg2://")
    made = MetaData()
    made.reflect(create_engine(url, poolclass=NullPool), only=list(base.metadata.tables))

    for table in base.metadata.sorted_tables:
        for column in table.columns:
            assert form(column) == form(made.tables[table.name].columns[column.name]), column
