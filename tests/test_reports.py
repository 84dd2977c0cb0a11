"""What users of similar systems have reported: each kind of fault is shown to be closed here."""

import resource
import socket
import struct
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from http.client import HTTPConnection
from select import select
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import Any

import pytest
from redis import Redis as RedisClient

from common.stream import STREAM
from dev.local import HOST, PIN, ROOT, Postgres, Redis, Service
from tests.load import PATIENT, hung
from tests.support import Customer, Database, Servers, eventually, log_lines, new_servers

Customers = Callable[..., Customer]
Start = Callable[..., Service]
DEMO_ACCOUNT = "1234567890"  # in every database
HEAD = "{} HTTP/1.1\r\nHost: bank\r\n"
DOWNLOAD = HEAD.format("GET /static-offline-docs/swagger-ui-bundle.js").encode() + b"\r\n"
UNFINISHED = HEAD.format("GET /saldo").encode() + b"Cookie: "
LOCK = "SELECT FROM rekening WHERE no_rekening = %s FOR UPDATE"
WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'transaksi'"
AHEAD_OF_NOW = """
    UPDATE transaksi SET tanggal_transaksi = now() + interval '1 hour' FROM outbox
    WHERE id = id_transaksi;
    UPDATE outbox SET dikirim_pada = now() + interval '1 hour'
"""
# While a file exists, connecting fails as it does when PostgreSQL refuses it in Latin-1.
REFUSE_IN_LATIN_1 = """
import os, psycopg2
def connect(*args, connect=psycopg2.connect, **kwargs):
    if os.path.exists({!r}):
        b"d\\xe9mon".decode()
    return connect(*args, **kwargs)
psycopg2.connect = connect
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with new_servers() as started:
        for limit in ("lock_timeout", "statement_timeout"):  # longer than a test holds a lock
            started.database(f"ALTER ROLE transaksi SET {limit} = '40s'")
        yield started


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends with the test what it has started."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start(servers: Servers, stack: ExitStack) -> Start:
    """Starts services that end with the test."""

    def start(name: str, *options: str, **more: dict[str, str]) -> Service:
        patience = PATIENT if name == "transaksi" else ()
        return stack.enter_context(servers.service(name, *patience, *options, **more))

    return start


@pytest.fixture
def account(servers: Servers) -> str:
    return servers.database.open_account()


class Proxy(ThreadingTCPServer):
    """Forwards connections to a target that can be changed. Open ones stay where they are."""

    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__((HOST, 0), Forward)
        self.target = target
        self.port = str(self.server_address[1])
        Thread(target=self.serve_forever, args=[0.01]).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


class Forward(BaseRequestHandler):
    """One connection of a proxy."""

    server: Proxy

    def handle(self) -> None:
        with suppress(OSError), socket.create_connection((HOST, self.server.target)) as target:
            others = {self.request: target, target: self.request}
            while True:
                for end in select(others, [], [])[0]:
                    if not (data := end.recv(65_536)):
                        return
                    others[end].sendall(data)


def connect(service: Service) -> socket.socket:
    """Open a connection that has little room for what is not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect((HOST, service.port))
    return client


# ---------------------------------------------------------------- the wrong server


def test_a_read_only_postgresql_is_left_without_a_restart(
    servers: Servers, stack: ExitStack, start: Start, customer: Customers
) -> None:
    def alter_system(setting: str) -> None:
        servers.postgres.psql("-c", f"ALTER SYSTEM {setting}", "-c", "SELECT pg_reload_conf()")

    second = Postgres(servers.directory / "second")
    second.passwords = servers.postgres.passwords
    stack.enter_context(second)
    proxy = stack.enter_context(Proxy(servers.postgres.port))
    target = ("--db-port", proxy.port)
    transaksi = start("transaksi", *target)
    start("mutasi", *target)
    budi = customer(transaksi.url, DEMO_ACCOUNT)
    assert budi.deposit(1).status_code == 200
    servers.database.audit()

    stack.callback(alter_system, "RESET default_transaction_read_only")
    alter_system("SET default_transaction_read_only = on")
    eventually(lambda: budi.deposit(1).headers.get("Retry-After"))
    eventually(lambda: budi.client.get("/health").status_code == 503)

    proxy.target = second.port
    eventually(lambda: budi.deposit(100_000).status_code == 200)
    assert budi.client.get("/health").status_code == 200
    assert budi.balance() == Database(second).saldo(DEMO_ACCOUNT)
    Database(second).audit()


def test_a_redis_that_became_a_replica_is_left_without_a_restart(
    servers: Servers, stack: ExitStack, start: Start, account: str, customer: Customers
) -> None:
    password = servers.redis.password
    old: Any = servers.stream  # untyped, as its answers are
    second = stack.enter_context(Redis(servers.directory / "second-redis"))
    new = RedisClient(port=second.port, password=second.password)
    stack.callback(new.close)
    new.config_set("requirepass", password)
    proxy = stack.enter_context(Proxy(servers.redis.port))
    target = ("--redis-port", proxy.port)
    transaksi = start("transaksi", *target)
    mutasi = start("mutasi", *target)
    ani = customer(transaksi.url, account)
    assert ani.deposit(1).status_code == 200
    servers.database.audit()

    old.config_set("masterauth", password)
    stack.callback(old.replicaof, "NO", "ONE")
    with hung(mutasi):
        # A blocked connection would be closed by the server.
        eventually(lambda: old.info("clients")["blocked_clients"] == 0)
        old.replicaof(HOST, second.port)
        proxy.target = second.port
    assert ani.deposit(1).status_code == 200
    servers.database.audit()
    eventually(lambda: new.xlen(STREAM) == 0)

    assert "ReadOnlyError" in log_lines(transaksi, "sending to the stream failed")[0]["error"]
    assert log_lines(mutasi, "processing failed")


def test_a_connection_that_is_refused_in_latin_1_is_a_503(
    servers: Servers, start: Start, account: str, customer: Customers
) -> None:
    refused = servers.directory / "refused"
    (servers.directory / "sitecustomize.py").write_text(REFUSE_IN_LATIN_1.format(str(refused)))
    environment = {"PYTHONPATH": f"{servers.directory}:{ROOT}"}
    transaksi = start("transaksi", environment=environment)
    ani = customer(transaksi.url, account)
    siti = customer(transaksi.url, servers.database.open_account())  # with a PIN not yet cached
    reads = [partial(who.client.get, path) for path in ("/saldo", "/mutasi") for who in (ani, siti)]
    requests = [partial(ani.deposit, 1), *reads]
    assert requests[0]().status_code == 200

    refused.touch()
    servers.database(END_SESSIONS)
    answers = [request() for request in requests]
    refused.unlink()

    assert [(a.status_code, a.headers.get("Retry-After")) for a in answers] == [(503, "1")] * 5
    assert {request().status_code for request in requests} == {200}


# ---------------------------------------------------------------- connections


def test_a_connection_may_be_idle_for_long(stack: ExitStack, start: Start) -> None:
    def ask(connection: HTTPConnection) -> int:
        connection.request("GET", "/openapi.json")
        with connection.getresponse() as answer:
            answer.read()
            return answer.status

    transaksi = start("transaksi")
    connections = [HTTPConnection(HOST, transaksi.port, timeout=30) for _ in range(50)]
    for connection in connections:
        stack.callback(connection.close)
        assert ask(connection) == 200

    time.sleep(6)  # uvicorn's own limit is 5 s

    assert {ask(connection) for connection in connections} == {200}


def test_unfinished_heads_and_unread_downloads_keep_nobody_out(
    stack: ExitStack, start: Start, account: str, customer: Customers
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    transaksi = start("transaksi")
    for number in range(2500):
        client = stack.enter_context(connect(transaksi))
        with suppress(ConnectionError):  # it was idle for longest
            client.sendall(UNFINISHED + b"x" * 10_000 if number % 2 else DOWNLOAD)

    answers = [customer(transaksi.url, account).client.get("/saldo") for _ in range(20)]
    reached = log_lines(transaksi, "connection limit reached")

    assert {answer.status_code for answer in answers} == {200}
    assert [line["level"] for line in reached] == ["WARNING"]


def test_a_head_that_trickles_in_is_cut_off_in_time(start: Start) -> None:
    def trickle(client: socket.socket) -> None:
        for _ in range(300):
            client.sendall(b"x")
            time.sleep(0.1)

    with connect(start("transaksi", "--request-timeout", "1")) as client:
        client.sendall(UNFINISHED)
        with pytest.raises(ConnectionError):
            trickle(client)


def test_movements_whose_client_has_left_are_logged_as_accepted(
    servers: Servers, start: Start, account: str
) -> None:
    """Two pipelined deposits, and a reset before, between or after their answers."""
    transaksi = start("transaksi")
    payload = f'{{"no_rekening": "{account}", "nominal": 1}}'
    credentials = b64encode(f"{account}:{PIN}".encode()).decode()
    head = HEAD.format("POST /tabung") + f"Authorization: Basic {credentials}\r\n"
    fields = f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    deposit = (head + fields + payload).encode()
    reset_on_close = struct.pack("ii", 1, 0)
    for answers in (0, 1, 2) * 10:
        lock = nullcontext() if answers else servers.database.holding(LOCK, account)
        with lock, connect(transaksi) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
            client.sendall(deposit * 2)
            if not answers:
                eventually(lambda: servers.database(WAITING))
            received = b""
            while received.count(b"saldo") < answers:
                received += client.recv(1)

    transaksi.stop()
    journal = "SELECT id FROM transaksi WHERE no_rekening = %s ORDER BY id"
    ids = [row[0] for row in servers.database(journal, account)]
    lines = log_lines(transaksi, "(?!outbox).*")
    assert len(ids) >= 30
    assert sorted(line["id_transaksi"] for line in lines if "movement" in line) == ids
    assert {line["level"] for line in lines} == {"INFO"}


# ---------------------------------------------------------------- clocks


def test_a_lost_movement_with_times_ahead_of_now_is_resent_and_reported(
    servers: Servers, start: Start, account: str, customer: Customers
) -> None:
    transaksi = start("transaksi")
    assert customer(transaksi.url, account).deposit(1).status_code == 200
    eventually(lambda: servers.stream.xlen(STREAM))

    servers.stream.delete(STREAM)
    servers.database(AHEAD_OF_NOW)

    eventually(lambda: servers.stream.xlen(STREAM))
    eventually(lambda: log_lines(transaksi, "outbox is behind"))
    start("mutasi")
    servers.database.audit()
