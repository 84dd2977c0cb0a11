"""The HTTP contract: every kind of request, and its documented answer."""

import re
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import partial
from http.client import HTTPConnection
from itertools import product
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine

from tests.support import DIRECT, Customer, Database, Servers, eventually
from transaksi.datastore import find_mutations

Customers = Callable[..., Customer]

PAYLOAD = (400, "Payload bukan JSON yang sah.")
ACCOUNT = (400, "no_rekening harus teks berisi 10 sampai 16 angka.")
AMOUNT = (400, "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah.")
KEY = (400, "Idempotency-Key harus 1 sampai 255 karakter ASCII yang tercetak.")
BATAS = (400, "batas harus bilangan bulat 1 sampai 100.")
SEBELUM = (400, "sebelum harus bilangan bulat positif, paling banyak 19 angka.")
UNKNOWN = (400, "Nomor rekening tidak dikenali.")
WRONG_PIN = (401, "Nomor rekening atau PIN salah.")
NO_PATH = (404, "Alamat tidak dikenali.")
NO_METHOD = (405, "Metode tidak diizinkan untuk alamat ini.")
TOO_LARGE = (413, "Payload melebihi 4 KiB.")

SITI = "2345678901"
OK = b'{"no_rekening": "2345678901", "nominal": 11}'
FIELDS = {"no_rekening": b'"2345678901"', "nominal": b"11"}
PAIR = b"2345678901:234567"
AUTH = b"Basic " + b64encode(PAIR)
HEADERS = {"Content-Type": [b"application/json"], "Authorization": [AUTH]}
TEXTS = (OK[:-5], OK + OK, b"", b"[]", b"null", b"no_rekening=1", b"[" * 2000 + b"]" * 2000)
TOKENS = (PAIR, AUTH.rstrip(b"="), AUTH + b"!", b"Basic", b"Basic " + PAIR, b"Basic \xff")
PINS = b"2345678901:23456 2345678901:2345678 2345678901:654321 9999999999:123456 2345678901234567"
PAIRS = (*PINS.split(), PAIR + b"\n", b"\xff\xfe:\xff", PAIR[:11] + b"\xef\xbc\x91" * 6)
NO_NUMBERS = ("", "0", "-1", "x", "1.0", "1e1", "%2B1", "%201", "1_0", "%EF%BC%91", "%00")
# Values in one part of a request. A list: header lines, or chunks.
ACCEPTED: list[tuple[str, list[Any]]] = [
    ("payload", [OK, OK.ljust(4096), OK[:-1] + rb', "a": [{}], "b": "\ud83d\ude00"}']),
    ("payload", [[OK[:9], OK[9:]], OK[:-1] + rb', "unknown": "\ud800"}']),
    ("nominal", [b"1000000000000", b'-5, "nominal": 1']),  # the last of two counts
    ("Content-Type", [b"application/a+json", b"application/json; charset=utf-8"]),
    ("Authorization", [b"basic" + AUTH[5:], b"BASIC" + AUTH[5:]]),
    ("Idempotency-Key", [b"~" * 255]),
]
REFUSED: list[tuple[tuple[int, str], str, list[Any]]] = [
    (AMOUNT, "nominal", b"0 -0 -1 1.0 0.5 1e3 1e400 NaN -Infinity true null [1]".split()),
    (AMOUNT, "nominal", b'1000000000001 9007199254740993 "5" 1,"nominal":-5'.split()),
    (AMOUNT, "payload", [OK.replace(b"11", b"9" * 4000), b'{"no_rekening": "2345678901"}']),
    (ACCOUNT, "no_rekening", b'2345678901 "123456789" "12345678901234567" null'.split()),
    (ACCOUNT, "no_rekening", rb'"2345678901\n" "2345678901\u0000" "\uff12345678901"'.split()),
    (ACCOUNT, "no_rekening", [rb'"\ud800"']),  # no Unicode: RFC 8259, section 8.2
    (ACCOUNT, "payload", [b'{"nominal": 1}', b"{}"]),
    (UNKNOWN, "no_rekening", b'"1234567890" "9999999999" "02345678901"'.split()),
    (PAYLOAD, "no_rekening", [b'"\xff\xfe"']),
    (PAYLOAD, "payload", list(TEXTS)),
    (PAYLOAD, "Content-Type", [[], b"text/plain", b"application/x-www-form-urlencoded", b"\xff"]),
    (KEY, "Idempotency-Key", [b"~" * 256, b"", b"a\tb", b"\xc3\xa9", [b"a", b"a"]]),
    (WRONG_PIN, "Authorization", [[], [AUTH, AUTH], b"", b"Bearer" + AUTH[5:], *TOKENS]),
    (WRONG_PIN, "Authorization", [b"Basic " + b64encode(x) for x in (*PAIRS, bytes(9_000))]),
    (TOO_LARGE, "payload", [OK.ljust(4097), OK.ljust(5_000_000), [OK.ljust(1024)] * 5000]),
    (TOO_LARGE, "payload", [b"[" * 40_000, OK.replace(b"11", b"9" * 5000)]),
    (BATAS, "line", [f"GET /mutasi?batas={text}" for text in (*NO_NUMBERS, "101", "9" * 19)]),
    (SEBELUM, "line", [f"GET /mutasi?sebelum={text}" for text in (*NO_NUMBERS, 2**63)]),
    (NO_PATH, "line", ["POST /setor", "POST /tabung/", "GET /", "GET /health/", "GET /%ff%00"]),
    (NO_PATH, "line", ["GET /saldo/1234567890/123456"]),  # neither is to be found in the logs
    (NO_METHOD, "line", ["GET /tabung", "DELETE /tarik?nominal=1", "OPTIONS /tarik"]),
    (NO_METHOD, "line", ["PUT /saldo", "POST /mutasi", "PROPFIND /saldo"]),
]


def send(url: str, line: str, **options: Any) -> httpx.Response:
    """Send a request over a connection of its own."""
    method, path = line.split()
    return httpx.request(method, url + path, **DIRECT, **options)


def ask(url: str, part: str, value: Any) -> httpx.Response:
    """Send a deposit of Siti with another value in one part of the request."""
    line, payload, headers = "POST /tabung", OK, HEADERS
    if part == "line":
        line = value
    elif part == "payload":
        payload = value
    elif part in FIELDS:
        payload = OK.replace(FIELDS[part], value)
    else:
        headers = HEADERS | {part: value if isinstance(value, list) else [value]}
    fields = [(name.encode(), text) for name, texts in headers.items() for text in texts]
    return send(url, line, headers=fields, content=payload)


@pytest.mark.parametrize(("part", "values"), ACCEPTED)
def test_requests_that_are_accepted(
    url: str, database: Database, part: str, values: list[Any]
) -> None:
    for value in values:
        before = database.saldo(SITI)

        answer = ask(url, part, value)

        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
        assert answer.json() == {"saldo": database.saldo(SITI)}
        assert answer.json()["saldo"] > before


@pytest.mark.parametrize(("expected", "part", "values"), REFUSED)
def test_every_request_gets_its_documented_answer(
    url: str, database: Database, expected: tuple[int, str], part: str, values: list[Any]
) -> None:
    before = database.saldo(SITI)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(partial(ask, url, part), values))

    challenge = 'Basic realm="transaksi", charset="UTF-8"' if expected[0] == 401 else None
    for value, answer in zip(values, answers, strict=True):
        assert (answer.status_code, answer.json()) == (expected[0], {"remark": expected[1]}), value
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers.get("WWW-Authenticate") == challenge
        allowed = "POST" if "/ta" in str(answer.url) else "GET"
        assert answer.headers.get("Allow") == (allowed if expected == NO_METHOD else None)
        assert expected[0] != 401 or answer.elapsed.total_seconds() > 0.3
    assert database.saldo(SITI) == before


def test_strangers_get_one_answer_for_every_path(url: str) -> None:
    asked = [value for _, part, values in REFUSED for value in values if part == "line"]
    lines = {line.partition("?")[0] for line in asked}
    files = ("", "/", "/x", "/%2e%2e/README.md", "-x", "/swagger-ui.css/x", "/redoc.js")
    lines |= {f"GET /static-offline-docs{file}" for file in files}
    upgrades: tuple[dict[str, str], ...] = ({}, {"Connection": "Upgrade", "Upgrade": "websocket"})

    with ThreadPoolExecutor(40) as threads:
        answers = [
            threads.submit(send, url, line, headers=upgrade)
            for line, upgrade in product(lines, upgrades)
        ]

    told = [(answer.result().status_code, answer.result().json()["remark"]) for answer in answers]
    assert set(told) == {WRONG_PIN}


def test_documentation_needs_no_other_host_and_ignores_range(url: str) -> None:
    page = send(url, "GET /docs").text
    assert not re.search(r"""https?:|['"]//""", page)
    files = re.findall(r'(?:src|href)="(/static-offline-docs/[^"]+)"', page)
    assert len(files) == len(re.findall("src=|href=", page)) >= 3
    for file, part in product(files, ("bytes=9-", "bytes=999999999-", "bytes=x", "lines=1-")):
        answer = send(url, f"GET {file}", headers={"Range": part})
        assert (answer.status_code, "Content-Range" in answer.headers) == (200, False)


@pytest.mark.parametrize("path", ["/saldo", "/mutasi", "/health", "/docs", "/openapi.json"])
def test_head_is_answered_like_get_and_post_is_refused(url: str, path: str) -> None:
    methods, pin = ("GET", "HEAD", "POST"), (SITI, "234567")

    get, head, post = (send(url, f"{method} {path}", auth=pin) for method in methods)

    assert get.status_code == head.status_code == 200
    assert get.headers["Content-Type"] == head.headers["Content-Type"]
    assert (head.content, head.headers["Content-Length"] > "0") == (b"", True)
    assert (post.status_code, post.json()["remark"]) == NO_METHOD


POST = b"POST /tabung HTTP/1.1\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\n"
PIN = b"Authorization: %s\r\n" % AUTH
CLOSE = b"Connection: close\r\n"
ODD_AMOUNT = 4_242  # in these alone
MOVE = OK.replace(b"11", b"%d" % ODD_AMOUNT)
PLAIN = b"Content-Length: %d\r\n\r\n%s" % (len(MOVE), MOVE)
EXPECT = b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n"
CHUNK = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(MOVE), MOVE)
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
# The statuses of all answers to these bytes, until the server closes the connection.
ODD: list[tuple[str, bytes]] = [
    ("200", GET + CLOSE + b"X: " + b"y" * 15_000 + b"\r\n\r\n"),
    ("400", GET + b"X: " + b"y" * 16_384 + b"\r\n\r\n"),
    ("200", GET + CLOSE + b"X: y\r\n" * 400 + b"\r\n"),
    ("400", GET + b"X: y\r\n" * 500 + b"\r\n"),
    ("200 200 200", (GET + b"\r\n") * 2 + GET + CLOSE + b"\r\n"),
    ("404", b"OPTIONS * HTTP/1.1\r\n" + PIN + CLOSE + b"\r\n"),
    ("400", b"BREW /saldo HTTP/1.1\r\n\r\n"),
    ("400", b"CONNECT bank:80 HTTP/1.1\r\n\r\n"),
    ("400", POST + PIN + CLOSE + b"Idempotency-Key:  \r\n" + PLAIN),
    ("400", POST + PIN + b"Content-Length: 5\r\n" + PLAIN),
    ("400", POST + PIN + b"Content-Length: 5\r\n" + CHUNK + b"0\r\n\r\n"),
    ("400", POST + PIN + b"Transfer-Encoding: x\r\n" + PLAIN),
    ("401", POST + CLOSE + CHUNK + b"0\r\n" + PIN + b"\r\n"),  # a trailer is no header
    ("", b"GET /saldo HTTP/1.1\r\n" + PIN + b"\r\n}"),  # a 400 would be taken for its answer
    # The last ones are more than a server reads at once.
    ("401", POST + UPGRADE + PLAIN + (POST + PIN + PLAIN) * 2000),
    # Refused before the payload is there.
    ("401", POST + EXPECT),
    ("401", POST + CHUNK),
    ("404", b"POST /setor HTTP/1.1\r\n" + PIN + EXPECT),
    ("404", b"POST /setor HTTP/1.1\r\n" + PIN + CHUNK),
]


def connect(url: str) -> socket.socket:
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port or 80), timeout=30)


def exchange(url: str, data: bytes) -> str:
    """Send bytes, and a deposit after the first answer. Return all answers until the end."""
    answers = b""
    with connect(url) as connection:
        with suppress(ConnectionError):
            connection.sendall(data)
        with suppress(ConnectionError):
            answers += connection.recv(65_536)
            connection.sendall(b"\n" + POST + PIN + PLAIN)  # after a payload of one byte, or none
            while received := connection.recv(65_536):
                answers += received
        with pytest.raises(ConnectionError):  # noqa: PT012 - the server reads no more, either
            for _ in range(600):
                connection.sendall(b"\n")
                time.sleep(0.05)
    return answers.decode()


def statuses(answers: str) -> str:
    return " ".join(re.findall(r"HTTP/1\.1 (\d+)", answers))


def test_odd_bytes_are_answered_and_move_nothing(url: str, database: Database) -> None:
    with ThreadPoolExecutor(len(ODD)) as threads:
        answers = list(threads.map(partial(exchange, url), [data for _, data in ODD]))

    for (expected, data), answer in zip(ODD, answers, strict=True):
        assert statuses(answer) == expected, data[-100:]
    assert database("SELECT id FROM transaksi WHERE nominal = %s", ODD_AMOUNT) == []


def test_a_payload_that_waits_for_100_continue_is_asked_for(url: str) -> None:
    refused = OK.replace(b"11", b"-1")
    expect = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(refused)
    with connect(url) as connection:
        connection.sendall(POST + PIN + expect)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"

        connection.sendall(refused)
        assert connection.recv(65_536).endswith(b"}")  # head and remark come in one packet


ENDLESS = [(POST, b"X: y\r\n"), (POST, b"x"), (POST + b"X: ", b"x"), (b"POST /", b"x")]


@pytest.mark.parametrize(("start", "piece"), [*ENDLESS, (b"", GET + b"\r\n")])
def test_endless_heads_and_pipelines_are_cut_off(url: str, start: bytes, piece: bytes) -> None:
    with connect(url) as connection, pytest.raises(ConnectionError):
        connection.sendall(start + piece * (50_000_000 // len(piece)))


@pytest.fixture(scope="module")
def ani(servers: Servers) -> Iterator[Customer]:
    """A customer, with a cached PIN, of a service that answers within about a second."""
    with servers.service("transaksi", "--request-timeout", "1") as service:
        ani = Customer(service.url, servers.database.open_account())
        with ani.client:
            eventually(lambda: ani.client.get("/saldo").status_code == 200)
            yield ani


NOT_EXECUTED = "Layanan sedang tidak tersedia, silakan coba lagi."
OUTCOME_UNKNOWN = (
    "Hasil belum pasti: ulangi dengan Idempotency-Key yang sama. "
    "Tanpa Idempotency-Key, cek saldo beberapa saat lagi."
)


def test_timeouts_tell_whether_money_may_have_moved(ani: Customer, database: Database) -> None:
    with database.holding("LOCK rekening, mutasi"), ThreadPoolExecutor() as threads:
        reads = [threads.submit(ani.client.get, path) for path in ("/saldo", "/mutasi")]
        deposit = threads.submit(ani.deposit, 1)

    for answer in [read.result() for read in reads]:
        assert (answer.status_code, answer.json()) == (503, {"remark": NOT_EXECUTED})
        assert answer.headers["Retry-After"] == "1"
    unknown = deposit.result()
    assert (unknown.status_code, unknown.json()) == (503, {"remark": OUTCOME_UNKNOWN})
    assert "Retry-After" not in unknown.headers


def test_stalled_heads_and_payloads_are_ended(ani: Customer) -> None:
    stalled = (POST, POST + PIN + CHUNK, POST + PIN + PLAIN[:-1])

    with ThreadPoolExecutor() as threads:
        head, *payloads = threads.map(partial(exchange, str(ani.client.base_url)), stalled)

    assert head == ""
    for answers in payloads:
        assert statuses(answers) == "503"
        assert "\r\nretry-after: 1\r\n" in answers
        assert NOT_EXECUTED in answers


def test_a_head_that_trickles_in_is_cut_off_in_time(ani: Customer) -> None:
    def trickle(client: socket.socket) -> None:
        for _ in range(300):
            client.sendall(b"x")
            time.sleep(0.1)

    with connect(str(ani.client.base_url)) as client:
        client.sendall(b"GET /saldo HTTP/1.1\r\nCookie: ")
        with pytest.raises(ConnectionError):
            trickle(client)


def status(connection: HTTPConnection) -> int:
    connection.request("GET", "/openapi.json")
    with connection.getresponse() as answer:
        answer.read()
        return answer.status


@pytest.fixture(scope="module", autouse=True)
def idle(url: str) -> Iterator[tuple[list[HTTPConnection], float]]:
    """Connections that are used once, before the other tests, and since when they are idle."""
    address = httpx.URL(url)
    connections = [HTTPConnection(address.host, address.port, timeout=30) for _ in range(50)]
    assert {status(connection) for connection in connections} == {200}
    yield connections, time.monotonic()
    for connection in connections:
        connection.close()


def test_balance_ends_at_2_to_53_minus_1(url: str, database: Database, customer: Customers) -> None:
    ani = customer(url, database.open_account())
    update = "UPDATE rekening SET saldo = %s WHERE no_rekening = %s"
    database(update, 2**53 - 2, ani.no_rekening)

    answers = [ani.deposit(1).json(), ani.deposit(1).json()]

    assert answers == [{"saldo": 2**53 - 1}, {"remark": "Saldo akan melebihi batas."}]
    assert ani.balance() == 2**53 - 1
    database(update, 1, ani.no_rekening)  # as the journal has it


def test_statement_shows_what_is_booked(url: str, database: Database, customer: Customers) -> None:
    ani = customer(url, database.open_account())
    with database.holding("LOCK mutasi IN SHARE MODE"):  # it may be read, but not written
        assert [ani.deposit(nominal).status_code for nominal in range(1, 22)] == [200] * 21
        assert ani.client.get("/mutasi").json() == {"mutasi": [], "sebelum": None}
    database.audit()
    journal = "SELECT tanggal_transaksi, id, jenis_transaksi, nominal, saldo_akhir FROM transaksi"
    rows = database(f"{journal} WHERE no_rekening = %s ORDER BY id DESC", ani.no_rekening)

    for batas, start, end in ((None, 0, 20), (None, 20, 21), (21, 0, 21), (7, 7, 14), (7, 14, 21)):
        query = {"sebelum": rows[start - 1][1] if start else 2**63 - 1, "no_rekening": SITI}
        page = ani.client.get("/mutasi", params=query | ({"batas": batas} if batas else {})).json()

        assert page["sebelum"] == (rows[end - 1][1] if end < 21 else None)
        for movement, row in zip(page["mutasi"], rows[start:end], strict=True):
            moment = datetime.fromisoformat(movement.pop("tanggal_transaksi"))
            assert (moment, *movement.values()) == row

    engine = create_engine(database.server.url("transaksi").replace("://", "+psycopg2://"))
    assert len(find_mutations(engine, ani.no_rekening, None, 7)) == 7  # not the whole statement
    engine.dispose()


def test_every_status_is_documented_with_its_schema(url: str) -> None:
    document = send(url, "GET /openapi.json").json()
    move, read = "200 400 401 413 422 503", "200 401 503"
    expected = {"/tabung": move, "/tarik": move, "/saldo": read, "/mutasi": "200 400 401 4XX 503"}
    expected["/health"] = "200 503"
    schemas = document["components"]["schemas"]

    for path, methods in document["paths"].items():
        (operation,) = methods.values()
        assert " ".join(sorted(operation["responses"])) == expected.pop(path)
        assert operation.get("security") == ([{"PIN": []}] if path != "/health" else None)
        for status, answer in operation["responses"].items():
            schema = answer["content"]["application/json"]["schema"]
            assert (schema == {"$ref": "#/components/schemas/Error"}) == (status != "200")
    assert expected == {}
    assert document["components"]["securitySchemes"] == {"PIN": {"type": "http", "scheme": "basic"}}
    assert set(re.findall(r"#/components/schemas/(\w+)", str(document))) == set(schemas)
    assert schemas["Error"]["required"] == list(schemas["Error"]["properties"]) == ["remark"]


def test_every_integer_is_documented_as_int64(url: str) -> None:
    integers = re.findall('{[^{}]*"type":"integer"[^{}]*}', send(url, "GET /openapi.json").text)
    assert len(integers) >= 8
    assert all('"format":"int64"' in integer for integer in integers)


def test_payload_and_parameters_are_documented(url: str) -> None:
    document = send(url, "GET /openapi.json").json()
    payload = document["components"]["schemas"]["MovementRequest"]
    (key,) = document["paths"]["/tarik"]["post"]["parameters"]
    before, limit = document["paths"]["/mutasi"]["get"]["parameters"]

    assert set(payload["required"]) == set(payload["properties"]) == {"no_rekening", "nominal"}
    assert all(field["examples"] for field in payload["properties"].values())
    optional = [(p["in"], p["name"]) for p in (key, before, limit) if not p.get("required")]
    assert optional == [("header", "Idempotency-Key"), ("query", "sebelum"), ("query", "batas")]
    assert key["schema"]["pattern"] == "^[ -~]{1,255}$"
    assert limit["schema"].items() >= {"minimum": 1, "maximum": 100, "default": 20}.items()
    assert before["schema"]["anyOf"][0].items() >= {"minimum": 1, "maximum": 2**63 - 1}.items()


def test_a_connection_may_be_idle_for_long(idle: tuple[list[HTTPConnection], float]) -> None:
    """The last test, so that the others have used the time."""
    connections, since = idle

    time.sleep(max(0, since + 6 - time.monotonic()))  # uvicorn's own limit is 5 s

    assert {status(connection) for connection in connections} == {200}
