"""What users of similar systems have reported: each kind of fault is shown to be closed here."""

import socket
import struct
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from select import select
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import Any

import pytest
from redis import Redis as RedisClient

from common.stream import STREAM
from dev.local import HOST, PIN, Postgres, Redis, Service
from tests.load import PATIENT, Bank, configured, get, hung
from tests.support import (
    Customer,
    Database,
    Servers,
    eventually,
    log_lines,
    new_servers,
    running,
)

Customers = Callable[..., Customer]
DEMO_ACCOUNT = "1234567890"  # in every database
HEAD = "{} HTTP/1.1\r\nHost: bank\r\n"
DOWNLOAD = HEAD.format("GET /static-offline-docs/swagger-ui-bundle.js").encode() + b"\r\n"
UNFINISHED = HEAD.format("GET /saldo").encode() + b"Cookie: " + b"x" * 10_000
LOCK = "SELECT FROM rekening WHERE no_rekening = %s FOR UPDATE"
WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'transaksi'"
AHEAD_OF_NOW = """
    UPDATE transaksi SET tanggal_transaksi = now() + interval '1 hour' FROM outbox
    WHERE id = id_transaksi;
    UPDATE outbox SET dikirim_pada = now() + interval '1 hour'
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends with the test what it has started."""
    with ExitStack() as stack:
        yield stack


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


@dataclass
class Routed:
    """Both services, whose servers can be exchanged."""

    servers: Servers
    postgres: Proxy
    redis: Proxy
    transaksi: Service
    mutasi: Service


@pytest.fixture(scope="module")
def routed() -> Iterator[Routed]:
    with (
        new_servers() as servers,
        Proxy(servers.postgres.port) as postgres,
        Proxy(servers.redis.port) as redis,
    ):
        ports = ("--db-port", postgres.port, "--redis-port", redis.port)
        transaksi = servers.service("transaksi", *PATIENT, *ports)
        mutasi = servers.service("mutasi", *ports)
        with running(transaksi, mutasi):
            yield Routed(servers, postgres, redis, transaksi, mutasi)


@pytest.fixture
def budi(routed: Routed, customer: Customers) -> Customer:
    """A customer whose movement is booked, while the services use their first servers."""
    routed.postgres.target = routed.servers.postgres.port
    routed.redis.target = routed.servers.redis.port
    budi = customer(routed.transaksi.url, DEMO_ACCOUNT)
    eventually(lambda: budi.deposit(1).status_code == 200)
    routed.servers.database.audit()
    return budi


def test_a_read_only_postgresql_is_left_without_a_restart(routed: Routed, budi: Customer) -> None:
    first, second = routed.servers.postgres, Postgres(routed.servers.directory / "second")
    second.passwords = first.passwords

    with second, configured(first, "default_transaction_read_only", "on"):
        eventually(lambda: budi.deposit(1).headers.get("Retry-After"))
        eventually(lambda: budi.client.get("/health").status_code == 503)

        routed.postgres.target = second.port
        eventually(lambda: budi.deposit(100_000).status_code == 200)
        assert budi.client.get("/health").status_code == 200
        assert budi.balance() == Database(second).saldo(DEMO_ACCOUNT)
        Database(second).audit()


def test_a_redis_that_became_a_replica_is_left_without_a_restart(
    routed: Routed, stack: ExitStack, budi: Customer
) -> None:
    password = routed.servers.redis.password
    old: Any = routed.servers.stream  # untyped, as its answers are
    second = stack.enter_context(Redis(routed.servers.directory / "second-redis"))
    new = RedisClient(port=second.port, password=second.password)
    stack.callback(new.close)
    new.config_set("requirepass", password)
    old.config_set("masterauth", password)
    stack.callback(old.replicaof, "NO", "ONE")

    with hung(routed.mutasi):
        # A blocked connection would be closed by the server.
        eventually(lambda: old.info("clients")["blocked_clients"] == 0)
        old.replicaof(HOST, second.port)
        routed.redis.target = second.port
    assert budi.deposit(1).status_code == 200
    routed.servers.database.audit()
    eventually(lambda: new.xlen(STREAM) == 0)

    failures = log_lines(routed.transaksi, "sending to the stream failed")
    assert "ReadOnlyError" in failures[-1]["error"]
    assert log_lines(routed.mutasi, "processing failed")


def test_a_connection_that_is_refused_in_latin_1_is_a_503(
    bank: Bank, stack: ExitStack, customer: Customers
) -> None:
    url = bank.started(bank.faulty).url
    ani, siti = (customer(url, bank.sql.open_account()) for _ in range(2))
    reads = [partial(who.client.get, path) for path in ("/saldo", "/mutasi") for who in (ani, siti)]
    requests = [partial(ani.deposit, 1), *reads]
    assert requests[0]().status_code == 200  # caches the PIN of one of them

    bank.refused.touch()
    stack.callback(bank.refused.unlink, missing_ok=True)
    bank.sql(END_SESSIONS)
    answers = [request() for request in requests]
    bank.refused.unlink()

    assert [(a.status_code, a.headers.get("Retry-After")) for a in answers] == [(503, "1")] * 5
    assert {request().status_code for request in requests} == {200}


def connect(service: Service) -> socket.socket:
    """Open a connection that has little room for what is not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect((HOST, service.port))
    return client


def test_unfinished_heads_and_unread_downloads_keep_nobody_out(
    bank: Bank, stack: ExitStack, customer: Customers
) -> None:
    calm = bank.started(bank.calm)
    for number in range(1250):  # a quarter more than it keeps
        client = stack.enter_context(connect(calm))
        with suppress(ConnectionError):  # it was idle for longest
            client.sendall(UNFINISHED if number % 2 else DOWNLOAD)

    no_rekening = bank.sql.open_account()
    answers = [customer(calm.url, no_rekening).client.get("/saldo") for _ in range(20)]
    reached = log_lines(calm, "connection limit reached")

    assert {answer.status_code for answer in answers} == {200}
    assert [line["level"] for line in reached] == ["WARNING"]


def test_a_slow_reader_gets_whole_answers(bank: Bank, stack: ExitStack) -> None:
    quick = bank.started(bank.quick)
    size = len(get(quick, "/static-offline-docs/swagger-ui-bundle.js").content)
    client = stack.enter_context(connect(quick))

    client.sendall(DOWNLOAD * 8)  # more than the buffers hold
    time.sleep(1.5)  # longer than the request timeout

    received = 0
    while received < 8 * size:
        part = client.recv(1_000_000)
        assert part, "the answer was cut"
        received += len(part)


def test_an_unread_download_does_not_hold_up_the_end(bank: Bank, stack: ExitStack) -> None:
    quick = bank.started(bank.quick)
    client = stack.enter_context(connect(quick))
    client.sendall(DOWNLOAD * 8)  # more than the buffers hold
    client.recv(1)

    assert quick.stop(timeout=8) == 0


def test_movements_whose_client_has_left_are_logged_as_accepted(bank: Bank) -> None:
    """Two pipelined deposits, and a reset before, between or after their answers."""
    account, calm = bank.sql.open_account(), bank.started(bank.calm)
    payload = f'{{"no_rekening": "{account}", "nominal": 1}}'
    credentials = b64encode(f"{account}:{PIN}".encode()).decode()
    head = HEAD.format("POST /tabung") + f"Authorization: Basic {credentials}\r\n"
    fields = f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    deposit = (head + fields + payload).encode()
    reset_on_close = struct.pack("ii", 1, 0)
    for answers in (0, 1, 2) * 10:
        lock = nullcontext() if answers else bank.sql.holding(LOCK, account)
        with lock, connect(calm) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
            client.sendall(deposit * 2)
            if not answers:
                eventually(lambda: bank.sql(WAITING))
            received = b""
            while received.count(b"saldo") < answers:
                received += client.recv(1)

    assert calm.stop() == 0  # has written all lines
    journal = "SELECT id FROM transaksi WHERE no_rekening = %s ORDER BY id"
    ids = [row[0] for row in bank.sql(journal, account)]
    lines = log_lines(calm)
    assert len(ids) >= 30
    assert sorted(line["id_transaksi"] for line in lines if "outcome" in line) == ids
    assert {line["level"] for line in lines} == {"INFO"}


def test_a_lost_movement_with_times_ahead_of_now_is_resent_and_reported(bank: Bank) -> None:
    with hung(bank.mutasi):
        assert bank.send(bank.deposits(1)) == {200}
        eventually(lambda: bank.stream.xlen(STREAM))

        bank.stream.delete(STREAM)
        bank.sql(AHEAD_OF_NOW)

        eventually(lambda: bank.stream.xlen(STREAM))
        eventually(lambda: log_lines(bank.transaksi, "outbox is behind"))
