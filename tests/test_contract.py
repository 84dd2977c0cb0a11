"""Every row of the HTTP contract: what is sent byte for byte, and the documented answer to it."""

import json
import re
import socket
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import datetime
from functools import partial
from http.client import HTTPConnection
from itertools import cycle, product, repeat
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import PIN, Customer, Database, Servers

Headers = dict[str, list[bytes]]

PAYLOAD = "Payload bukan JSON yang sah."
ACCOUNT = "no_rekening harus teks berisi 10 sampai 16 angka."
AMOUNT = "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah."
KEY = "Idempotency-Key harus 1 sampai 255 karakter ASCII yang tercetak."
BEFORE = "sebelum harus bilangan bulat positif, paling banyak 18 angka."
LIMIT = "batas harus bilangan bulat 1 sampai 100."
UNKNOWN = "Nomor rekening tidak dikenali."
NOT_JSON = "Content-Type harus application/json."
WRONG_PIN = "Nomor rekening atau PIN salah."
TOO_LATE = "Payload tidak diterima lengkap pada waktunya."
TOO_LARGE = "Payload melebihi 4 KiB."
UNAVAILABLE = "Layanan sedang tidak tersedia, silakan coba lagi."

OK = b'{"no_rekening": "2345678901", "nominal": 1}'
AUTH = b"Basic " + b64encode(RIGHT := b"2345678901:234567")
HEADERS: Headers = {"Content-Type": [b"application/json"], "Authorization": [AUTH]}
CHUNKED = HEADERS | {"Transfer-Encoding": [b"chunked"], "Content-Length": []}
ACCOUNT_BODY, AMOUNT_BODY = OK.replace(b'"2345678901"', b"%s"), OK.replace(b"1}", b"%s}")
BODIES = {"payload": b"%s", "no_rekening": ACCOUNT_BODY, "nominal": AMOUNT_BODY}
BIG = b"9" * 5000
TEXTS = (OK[:-5], OK + OK, b"", b"[]", b"null", b"no_rekening=1", b"[" * 2000 + b"]" * 2000)
TOKENS = (RIGHT, AUTH.rstrip(b"="), b"Basic", b"Basic " + RIGHT, b"Basic \xff", b"Basic " + b"A" * 60_000)
PINS = b"2345678901:23456 2345678901:2345678 2345678901:654321 9999999999:123456 2345678901234567"
PAIRS = (*PINS.split(), RIGHT + b"\n", b"\xff\xfe:\xff", RIGHT[:11] + b"\xef\xbc\x91" * 6)
# Status and remark of the answer to requests with each of these values in one part (a list: header lines).
EXCHANGES: list[tuple[int, str | None, str, list[Any]]] = [
    (200, None, "payload", [OK, OK.ljust(4096), OK[:-1] + rb', "a": [{}], "b": "\ud83d\ude00"}']),
    (200, None, "nominal", [b"1000000000000", b'-5, "nominal": 1']),  # the last of two counts
    (200, None, "Content-Type", [b"application/a+json", b"application/json; charset=utf-8"]),
    (200, None, "Authorization", [b"basic" + AUTH[5:], b"BASIC" + AUTH[5:]]),
    (200, None, "Idempotency-Key", [b"~" * 255]),
    (400, AMOUNT, "nominal", b"0 -0 -1 1.0 0.5 1e3 1e400 NaN -Infinity true null [1]".split()),
    (400, AMOUNT, "nominal", [*b'1000000000001 9007199254740993 "5" 1,"nominal":-5'.split(), BIG[:4000]]),
    (400, AMOUNT, "payload", [b'{"no_rekening": "2345678901"}']),
    (400, ACCOUNT, "no_rekening", b'2345678901 "123456789" "12345678901234567" null'.split()),
    (400, ACCOUNT, "no_rekening", rb'"2345678901\n" "2345678901\u0000" "\uff12345678901"'.split()),
    (400, ACCOUNT, "payload", [b'{"nominal": 1}']),
    (400, UNKNOWN, "no_rekening", b'"1234567890" "9999999999" "02345678901"'.split()),
    (400, PAYLOAD, "no_rekening", [b'"\xff\xfe"', rb'"\ud800"']),  # no Unicode: RFC 8259, 8.2
    (400, PAYLOAD, "payload", [*TEXTS, OK.decode().encode("utf-16"), OK[:-1] + rb', "a": "\ud800"}']),
    (400, KEY, "Idempotency-Key", [b"~" * 256, b"", b"  ", b"a\tb", b"\xc3\xa9", [b"a", b"a"]]),
    (401, WRONG_PIN, "Authorization", [[], [AUTH, AUTH], b"", b"Bearer" + AUTH[5:], *TOKENS]),
    (401, WRONG_PIN, "Authorization", [b"Basic " + b64encode(pair) for pair in PAIRS]),
    (413, TOO_LARGE, "payload", [OK.ljust(4097), OK.ljust(5_000_000), b"[" * 40_000, AMOUNT_BODY % BIG]),
    (415, NOT_JSON, "Content-Type", [[], b"text/plain", b"application/x-www-form-urlencoded", b"\xff"]),
]
CASES = [(status, remark, part, value) for status, remark, part, values in EXCHANGES for value in values]


def ask(url: str, headers: Headers, line: str, *pieces: bytes) -> tuple[int, Any, Any]:
    """Status, headers and JSON of the answer to these bytes, of which a server may not read all."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        connection.putrequest(*line.split())  # type: ignore[arg-type]
        for name, values in ({"Content-Length": [b"%d" % sum(map(len, pieces))]} | headers).items():
            for value in values:
                connection.putheader(name, value)
        with suppress(ConnectionError):  # it has answered and closed the connection
            connection.endheaders()
            for piece in pieces:
                connection.send(piece)
        with connection.getresponse() as response:
            return response.status, response.headers, json.loads(response.read())


@pytest.fixture
def ani(url: str, database: Database, customer: Callable[..., Customer]) -> Customer:
    return customer(url, database.open_account())


@pytest.mark.parametrize(("status", "remark", "part", "value"), CASES, ids=lambda x: ascii(x)[:40])
def test_every_request_gets_its_documented_answer(
    url: str, database: Database, status: int, remark: str | None, part: str, value: Any
) -> None:
    payload = BODIES[part] % value if part in BODIES else OK
    header = {} if part in BODIES else {part: value if isinstance(value, list) else [value]}
    count = "SELECT count(*) FROM transaksi WHERE no_rekening = '2345678901'"
    ((before,),) = database(count)
    began = time.monotonic()
    told, headers, body = ask(url, HEADERS | header, "POST /tabung", payload)
    assert status != 401 or time.monotonic() - began > 0.3
    assert (told, headers["Content-Type"]) == (status, "application/json"), body
    assert body == ({"remark": remark} if remark else {"saldo": body.get("saldo")})
    assert ("WWW-Authenticate" in headers) == (status == 401)
    assert database(count) == [(before + (status == 200),)]


def test_wrong_paths_methods_and_websockets_are_told_to_customers_only(url: str) -> None:
    unknown = ("POST /setor", "POST /tabung/", "GET /", "GET /health/", "GET /%ff%00")
    methods = ("GET /tabung", "DELETE /tarik?nominal=1", "OPTIONS /tarik", "PUT /saldo", "POST /mutasi")
    for line in unknown:
        assert ask(url, HEADERS, line)[::2] == (404, {"remark": "Alamat tidak dikenali."})
    for line in methods:
        status, headers, body = ask(url, HEADERS, line)
        assert (status, headers["Allow"]) == (405, "GET" if line in methods[-2:] else "POST")
        assert body == {"remark": "Metode tidak diizinkan untuk alamat ini."}
    assert {ask(url, {}, f"POST /{page}")[0] for page in ("health", "docs", "openapi.json")} == {405}
    upgrade: Headers = {"Connection": [b"Upgrade"], "Upgrade": [b"websocket"]}
    upgrade |= {"Sec-WebSocket-Version": [b"13"], "Sec-WebSocket-Key": [b64encode(bytes(16))]}
    lines = (*unknown, *methods, "GET /saldo", "GET /mutasi") * 2
    with ThreadPoolExecutor(len(lines)) as clients:
        strangers = list(clients.map(ask, repeat(url), cycle(({}, upgrade, {})), lines))
    assert [stranger[::2] for stranger in strangers] == [(401, {"remark": WRONG_PIN})] * len(lines)


def test_payload_may_come_in_chunks_up_to_its_limit(url: str) -> None:
    chunk = b"%x\r\n%s\r\n"
    assert ask(url, CHUNKED, "POST /tabung", chunk % (len(OK), OK), b"0\r\n\r\n")[0] == 200
    told = ask(url, CHUNKED, "POST /tabung", *repeat(chunk % (1024, OK.ljust(1024)), 5000))
    assert told[::2] == (413, {"remark": TOO_LARGE})


def test_head_over_64_kib_is_cut_off(url: str) -> None:
    address = urlsplit(url).hostname, urlsplit(url).port
    starts = (b"POST /tabung HTTP/1.1\r\n", b"POST /tabung HTTP/1.1\r\nX: ", b"POST /")
    for start, piece in product(starts, (b"X: y\r\n", b"x")):
        endless = start + piece * (50_000_000 // len(piece))
        with socket.create_connection(address, 30) as line, pytest.raises(ConnectionError):
            line.sendall(endless)


def sent(url: str, request: bytes, more: bytes = b"") -> bytes:
    """All that comes back for raw bytes, until the server hangs up."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 20) as line:
        line.sendall(request)
        if more:
            time.sleep(0.1)  # so that it is read by itself
            line.sendall(more)
        with suppress(ConnectionError):
            return b"".join(iter(partial(line.recv, 65536), b""))
    return b""


def test_no_bytes_beside_a_request_change_its_meaning(url: str, ani: Customer) -> None:
    assert ani.deposit(1).status_code == 200
    body = b'{"no_rekening": "%s", "nominal": 1}' % ani.no_rekening.encode()
    pin = b"Authorization: Basic %s\r\n" % b64encode(f"{ani.no_rekening}:{PIN}".encode())
    post = b"POST /tabung HTTP/1.1\r\nContent-Type: application/json\r\n"
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    chunk = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(body), body)
    in_trailer = sent(url, post + b"Connection: close\r\n" + chunk + pin + b"\r\n")
    assert in_trailer.startswith(b"HTTP/1.1 401")
    assert ani.balance() == 1
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    smuggled = sent(url, post + pin + upgrade + length, post + pin + length + body)
    assert smuggled.count(b"HTTP/1.1") == 1
    assert smuggled.startswith(b"HTTP/1.1 400")
    assert ani.balance() == 1
    with_surplus = sent(url, post + pin + length + body + b"}")  # answered, or cut off: unknown
    assert with_surplus == b"" or with_surplus.startswith(b"HTTP/1.1 200")


def test_pipelined_requests_and_header_fields_are_bounded(url: str) -> None:
    assert sent(url, b"GET / HTTP/1.1\r\n\r\n" * 5000).count(b"HTTP/1.1") <= 1
    assert sent(url, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 2000 + b"\r\n").startswith(b"HTTP/1.1 400")


def test_time_limit_ends_stalled_payloads_and_reads(servers: Servers) -> None:
    asked = [
        (CHUNKED, "POST /tabung", b'5\r\n{"no_'),
        (HEADERS | {"Content-Length": [b"99"]}, "POST /tarik", b"{"),
    ]
    asked += [(HEADERS, "GET /saldo", b""), (HEADERS, "GET /mutasi", b"")]
    with servers.service("transaksi", "--request-timeout", "1") as service:
        assert ask(service.url, HEADERS, "GET /saldo")[0] == 200  # the PIN is remembered
        began = time.monotonic()
        with ThreadPoolExecutor() as clients, servers.database.holding("LOCK rekening, mutasi"):
            answers = list(clients.map(lambda request: ask(service.url, *request), asked))
        assert 1 <= time.monotonic() - began < 5  # the default limit
    told = [(status, headers["Retry-After"], body["remark"]) for status, headers, body in answers]
    assert told == [(408, None, TOO_LATE)] * 2 + [(503, "1", UNAVAILABLE)] * 2


def test_balance_reaches_2_to_53_minus_1_and_no_more(database: Database, ani: Customer) -> None:
    update = "UPDATE rekening SET saldo = %s WHERE no_rekening = %s"
    database(update, 2**53 - 2, ani.no_rekening)
    assert ani.deposit(1).json() == {"saldo": 2**53 - 1}
    assert ani.deposit(1).json() == {"remark": "Saldo akan melebihi batas."}
    assert ani.balance() == 2**53 - 1
    database(update, 1, ani.no_rekening)  # as the journal has it


def test_statement_shows_booked_movements_page_by_page(database: Database, ani: Customer) -> None:
    with database.holding("LOCK mutasi IN SHARE MODE"):  # it may be read, but not written
        assert [ani.deposit(nominal).status_code for nominal in range(1, 22)] == [200] * 21
        assert ani.client.get("/mutasi").json() == {"mutasi": [], "sebelum": None}
    assert ani.balance() == database.saldo(ani.no_rekening) == sum(range(1, 22))
    database.audit()
    journal = "SELECT id, tanggal_transaksi, jenis_transaksi, nominal, saldo_akhir FROM transaksi"
    rows = database(f"{journal} WHERE no_rekening = %s ORDER BY id DESC", ani.no_rekening)
    for batas, sizes in ((20, [20, 1]), (21, [21]), (7, [7, 7, 7])):
        pages: list[list[dict[str, Any]]] = []
        query = {"no_rekening": "1234567890"} | ({} if batas == 20 else {"batas": str(batas)})
        while not pages or query["sebelum"] != "None":
            page = ani.client.get("/mutasi", params=query).json()
            query["sebelum"] = str(page["sebelum"])
            pages.append(page["mutasi"])
        assert [len(page) for page in pages] == sizes
        entries = [entry.values() for page in pages for entry in page]
        assert [(i, datetime.fromisoformat(moment), *rest) for i, moment, *rest in entries] == rows


def test_bad_query_is_refused_with_the_name_of_its_parameter(ani: Customer) -> None:
    bad = ("0", "-1", "", "x", "1.0", "1e1", "+1", " 1", "1_0", "\uff11", "\0", "9" * 19)
    for name, remark, values in (("batas", LIMIT, (*bad, "101")), ("sebelum", BEFORE, bad)):
        for value in values:
            answer = ani.client.get("/mutasi", params={name: value})
            assert (answer.status_code, answer.json()) == (400, {"remark": remark}), value


def test_database_away_is_503_with_retry_after(url: str, database: Database, ani: Customer) -> None:
    assert ani.balance() == 0  # the process at the other end remembers the PIN
    database("ALTER ROLE transaksi NOLOGIN")
    database("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'transaksi'")
    try:
        for answer in (ani.client.get("/saldo"), ani.client.get("/mutasi"), ani.deposit(1)):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.json() == {"remark": UNAVAILABLE}
        assert httpx.get(f"{url}/health").status_code == 503
    finally:
        database("ALTER ROLE transaksi LOGIN")
    assert ani.balance() == 0


def test_openapi_document_tells_the_truth(url: str) -> None:
    document = json.loads(text := httpx.get(f"{url}/openapi.json").text)
    schemas, pin = document["components"]["schemas"], document["components"]["securitySchemes"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) == set(schemas)
    assert list(pin.values()) == [{"type": "http", "scheme": "basic"}]
    paths = {path: next(iter(methods.values())) for path, methods in document["paths"].items()}
    move, read = {200, 400, 401, 408, 413, 415, 422, 503}, {200, 401, 503}
    assert {path: {int(s) for s in operation["responses"]} for path, operation in paths.items()} == {
        **{"/tabung": move, "/tarik": move, "/saldo": read, "/mutasi": {400, *read}, "/health": {200, 503}}
    }
    for path, operation in paths.items():
        assert operation.get("security") == (None if path == "/health" else [{name: []} for name in pin])
        for status, answer in operation["responses"].items():
            schema = answer["content"]["application/json"]["schema"]
            if status != "200":
                error = schemas[schema["$ref"].rpartition("/")[2]]
                assert error["required"] == list(error["properties"]) == ["remark"]
    payload = paths["/tarik"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(payload["required"]) == set(payload["properties"]) == {"no_rekening", "nominal"}
    assert all(field["examples"] for field in payload["properties"].values())
    (key,), (before, limit) = paths["/tarik"]["parameters"], paths["/mutasi"]["parameters"]
    asked = [(p["in"], p["name"]) for p in (key, before, limit) if not p.get("required")]
    assert asked == [("header", "Idempotency-Key"), ("query", "sebelum"), ("query", "batas")]
    keys = ("~" * 255, " ", "", "~" * 256, "a\tb", "\xe9")
    assert [bool(re.search(key["schema"]["pattern"], text)) for text in keys] == [True] * 2 + [False] * 4
    assert limit["schema"].items() >= {"minimum": 1, "maximum": 100, "default": 20}.items()


def test_documentation_needs_no_other_host_and_opens_nothing_else(url: str) -> None:
    page = httpx.get(f"{url}/docs").text
    assert not re.search(r"""https?:|['"]//""", page)
    linked = re.findall(r'(?:src|href)="(/static-offline-docs/[^"]+)"', page)
    assert len(linked) == len(re.findall("src=|href=", page)) >= 3
    assert {httpx.get(f"{url}{path}").status_code for path in linked} == {200}
    for rest in ("", "/", "/x", "/../README.md", "/%2e%2e/README.md", "-x", "/swagger-ui.css/x", "/redoc.js"):
        assert ask(url, {}, f"GET /static-offline-docs{rest}")[0] == 401
