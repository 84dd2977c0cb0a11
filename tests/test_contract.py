"""The HTTP contract: every kind of request, and its documented answer."""

import re
import socket
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from itertools import product, repeat
from typing import Any

import httpx
import pytest

from tests.support import Customer, Database, Servers

Customers = Callable[..., Customer]

ACCEPTED = (200, None)
PAYLOAD = (400, "Payload bukan JSON yang sah.")
ACCOUNT = (400, "no_rekening harus teks berisi 10 sampai 16 angka.")
AMOUNT = (400, "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah.")
KEY = (400, "Idempotency-Key harus 1 sampai 255 karakter ASCII yang tercetak.")
BATAS = (400, "batas harus bilangan bulat 1 sampai 100.")
SEBELUM = (400, "sebelum harus bilangan bulat positif, paling banyak 18 angka.")
UNKNOWN = (400, "Nomor rekening tidak dikenali.")
WRONG_PIN = (401, "Nomor rekening atau PIN salah.")
NO_PATH = (404, "Alamat tidak dikenali.")
NO_METHOD = (405, "Metode tidak diizinkan untuk alamat ini.")
TOO_LARGE = (413, "Payload melebihi 4 KiB.")
NOT_JSON = (415, "Content-Type harus application/json.")

SITI = "2345678901"
OK = b'{"no_rekening": "2345678901", "nominal": 11}'
FIELDS = {"no_rekening": b'"2345678901"', "nominal": b"11"}
AUTH = b"Basic " + b64encode(RIGHT := b"2345678901:234567")
HEADERS = {"Content-Type": [b"application/json"], "Authorization": [AUTH]}
TEXTS = (OK[:-5], OK + OK, b"", b"[]", b"null", b"no_rekening=1", b"[" * 2000 + b"]" * 2000)
TOKENS = (RIGHT, AUTH.rstrip(b"="), b"Basic", b"Basic " + RIGHT, b"Basic \xff")
PINS = b"2345678901:23456 2345678901:2345678 2345678901:654321 9999999999:123456 2345678901234567"
PAIRS = (*PINS.split(), RIGHT + b"\n", b"\xff\xfe:\xff", RIGHT[:11] + b"\xef\xbc\x91" * 6)
NO_NUMBERS = ("", "0", "-1", "x", "1.0", "1e1", "%2B1", "%201", "1_0", "%EF%BC%91", "%00", "9" * 19)
# The answer to each of these values in one part of a request. A list: header lines, or chunks.
EXCHANGES: list[tuple[tuple[int, str | None], str, list[Any]]] = [
    (ACCEPTED, "payload", [OK, OK.ljust(4096), OK[:-1] + rb', "a": [{}], "b": "\ud83d\ude00"}']),
    (ACCEPTED, "payload", [[OK[:9], OK[9:]]]),
    (ACCEPTED, "nominal", [b"1000000000000", b'-5, "nominal": 1']),  # the last of two counts
    (ACCEPTED, "Content-Type", [b"application/a+json", b"application/json; charset=utf-8"]),
    (ACCEPTED, "Authorization", [b"basic" + AUTH[5:], b"BASIC" + AUTH[5:]]),
    (ACCEPTED, "Idempotency-Key", [b"~" * 255]),
    (AMOUNT, "nominal", b"0 -0 -1 1.0 0.5 1e3 1e400 NaN -Infinity true null [1]".split()),
    (AMOUNT, "nominal", b'1000000000001 9007199254740993 "5" 1,"nominal":-5'.split()),
    (AMOUNT, "payload", [OK.replace(b"11", b"9" * 4000), b'{"no_rekening": "2345678901"}']),
    (ACCOUNT, "no_rekening", b'2345678901 "123456789" "12345678901234567" null'.split()),
    (ACCOUNT, "no_rekening", rb'"2345678901\n" "2345678901\u0000" "\uff12345678901"'.split()),
    (ACCOUNT, "payload", [b'{"nominal": 1}']),
    (UNKNOWN, "no_rekening", b'"1234567890" "9999999999" "02345678901"'.split()),
    (PAYLOAD, "no_rekening", [b'"\xff\xfe"', rb'"\ud800"']),  # no Unicode: RFC 8259, 8.2
    (PAYLOAD, "payload", [*TEXTS, OK.decode().encode("utf-16"), OK[:-1] + rb', "a": "\ud800"}']),
    (KEY, "Idempotency-Key", [b"~" * 256, b"", b"a\tb", b"\xc3\xa9", [b"a", b"a"]]),
    (WRONG_PIN, "Authorization", [[], [AUTH, AUTH], b"", b"Bearer" + AUTH[5:], *TOKENS]),
    (WRONG_PIN, "Authorization", [b"Basic " + b64encode(x) for x in (*PAIRS, bytes(45_000))]),
    (TOO_LARGE, "payload", [OK.ljust(4097), OK.ljust(5_000_000), [OK.ljust(1024)] * 5000]),
    (TOO_LARGE, "payload", [b"[" * 40_000, OK.replace(b"11", b"9" * 5000)]),
    (NOT_JSON, "Content-Type", [[], b"text/plain", b"application/x-www-form-urlencoded", b"\xff"]),
    (BATAS, "line", [f"GET /mutasi?batas={text}" for text in (*NO_NUMBERS, "101")]),
    (SEBELUM, "line", [f"GET /mutasi?sebelum={text}" for text in NO_NUMBERS]),
    (NO_PATH, "line", ["POST /setor", "POST /tabung/", "GET /", "GET /health/", "GET /%ff%00"]),
    (NO_METHOD, "line", ["GET /tabung", "DELETE /tarik?nominal=1", "OPTIONS /tarik"]),
    (NO_METHOD, "line", ["PUT /saldo", "POST /mutasi"]),
]
CASES = [(answer, part, value) for answer, part, values in EXCHANGES for value in values]

POST = b"POST /tabung HTTP/1.1\r\nContent-Type: application/json\r\n"
PIN = b"Authorization: %s\r\n" % AUTH
CLOSE = b"Connection: close\r\n"
PLAIN = b"Content-Length: %d\r\n\r\n%s" % (len(OK), OK)
CHUNK = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(OK), OK)


def sent(url: str, request: bytes) -> str:
    """All that comes back for these bytes, until the server hangs up."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 80), 20) as line:
        line.sendall(request)
        with suppress(ConnectionError):
            return line.makefile("rb").read().decode()
    return ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case[1:])[:50])
def test_every_request_gets_its_documented_answer(url: str, database: Database, case: Any) -> None:
    (status, remark), part, value = case
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
    before = database.saldo(SITI)
    with httpx.Client(base_url=url, timeout=20, verify=False) as client:
        answer = client.request(*line.split(), headers=fields, content=payload)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/json")
    assert answer.json() == ({"remark": remark} if remark else {"saldo": database.saldo(SITI)})
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    allowed = "GET" if value in ("PUT /saldo", "POST /mutasi") else "POST"
    assert answer.headers.get("Allow") == (allowed if status == 405 else None)
    assert status != 401 or answer.elapsed.total_seconds() > 0.3
    assert (database.saldo(SITI) != before) == (status == 200)


def test_strangers_get_the_documentation_and_nothing_else(url: str) -> None:
    lines = [value for _, part, value in CASES if part == "line"]
    files = ("", "/", "/x", "/%2e%2e/README.md", "-x", "/swagger-ui.css/x", "/redoc.js")
    lines += [f"GET /static-offline-docs{file}" for file in files]
    asked = product(lines, ({}, {"Connection": "Upgrade", "Upgrade": "websocket"}))
    with httpx.Client(base_url=url) as client, ThreadPoolExecutor(40) as pool:
        for answer in pool.map(lambda x: client.request(*x[0].split(), headers=x[1]), asked):
            assert (answer.status_code, answer.json()) == (401, {"remark": WRONG_PIN[1]})
        page = client.get("/docs").text
        assert not re.search(r"""https?:|['"]//""", page)  # it needs no other host
        linked = re.findall(r'(?:src|href)="(/static-offline-docs/[^"]+)"', page)
        assert len(linked) == len(re.findall("src=|href=", page)) >= 3
        assert {client.get(path).status_code for path in linked} == {200}
        assert {client.post(x).status_code for x in ("/health", "/docs", "/openapi.json")} == {405}


def test_heads_and_pipelines_are_bounded(url: str) -> None:
    for start, piece in product((POST, POST + b"X: ", b"POST /"), (b"X: y\r\n", b"x")):
        with pytest.raises(ConnectionError):
            sent(url, start + piece * (50_000_000 // len(piece)))
    assert sent(url, POST + b"X: y\r\n" * 2000 + b"\r\n").startswith("HTTP/1.1 400")
    assert sent(url, b"GET /docs HTTP/1.1\r\n\r\n" * 5000).count("HTTP/1.1") <= 1


def test_no_bytes_beside_a_request_change_its_meaning(url: str, database: Database) -> None:
    before = database.saldo(SITI)
    pin_in_trailer = POST + CLOSE + CHUNK + b"0\r\n" + PIN + b"\r\n"
    # The rest is more than a server reads at once.
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + PLAIN
    smuggled = POST + upgrade + (POST + PIN + PLAIN) * 4000
    blank_key = POST + PIN + CLOSE + b"Idempotency-Key:  \r\n" + PLAIN
    for request, status in ((pin_in_trailer, "401"), (smuggled, "401"), (blank_key, "400")):
        assert re.findall(r"HTTP/1\.1 (\d+)", sent(url, request)) == [status]
    assert database.saldo(SITI) == before
    assert sent(url, POST + PIN + PLAIN + b"}")[:12] in {"HTTP/1.1 200", ""}  # cut off: unknown


def test_time_limit_ends_stalled_payloads_and_reads(servers: Servers, customer: Customers) -> None:
    stalled = [POST + PIN + CLOSE + rest for rest in (CHUNK, PLAIN[:-1])]
    service = servers.service("transaksi", "--request-timeout", "2")
    with service, ThreadPoolExecutor() as pool:
        siti = customer(service.url, SITI, "234567")
        siti.balance()  # the PIN is remembered
        began = time.monotonic()
        with servers.database.holding("LOCK rekening, mutasi"):
            late = pool.map(sent, repeat(service.url), stalled)
            reads = pool.map(siti.client.get, ("/saldo", "/mutasi"))
            answers, told = [siti.deposit(1), *reads], "".join(late)
        assert 2 <= time.monotonic() - began < 5  # the default limit
    refusals = {(a.status_code, a.headers["Retry-After"], a.json()["remark"]) for a in answers}
    assert refusals == {(503, "1", "Layanan sedang tidak tersedia, silakan coba lagi.")}
    remark = '{"remark":"Payload tidak diterima lengkap pada waktunya."}'
    assert re.fullmatch(f"(HTTP/1.1 408 [^{{]*{remark}){{2}}", told)
    assert "retry-after" not in told.lower()


def test_balance_ends_at_2_to_53_minus_1(url: str, database: Database, customer: Customers) -> None:
    ani = customer(url, database.open_account())
    update = "UPDATE rekening SET saldo = %s WHERE no_rekening = %s"
    database(update, 2**53 - 2, ani.no_rekening)
    assert ani.deposit(1).json() == {"saldo": 2**53 - 1}
    assert ani.deposit(1).json() == {"remark": "Saldo akan melebihi batas."}
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
    for batas, start, end in ((20, 0, 20), (20, 20, 21), (21, 0, 21), (7, 7, 14), (7, 14, 21)):
        query = {"no_rekening": "1234567890"} | ({} if batas == 20 else {"batas": str(batas)})
        query |= {"sebelum": rows[start - 1][1]} if start else {}
        page = ani.client.get("/mutasi", params=query).json()
        assert page["sebelum"] == (rows[end - 1][1] if end < 21 else None)
        for entry, row in zip(page["mutasi"], rows[start:end], strict=True):
            moment = datetime.fromisoformat(entry.pop("tanggal_transaksi"))
            assert (moment, *entry.values()) == row


def test_openapi_document_tells_the_truth(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    move, read = "200 400 401 408 413 415 422 503", "200 401 503"
    statuses = {"/tabung": move, "/tarik": move, "/saldo": read, "/mutasi": "200 400 401 4XX 503"}
    paths = {path: next(iter(methods.values())) for path, methods in document["paths"].items()}
    for path, operation in paths.items():
        assert " ".join(sorted(operation["responses"])) == statuses.get(path, "200 503")  # /health
        assert operation.get("security") == ([{"PIN": []}] if path in statuses else None)
        for status, answer in operation["responses"].items():
            schema = answer["content"]["application/json"]["schema"]
            assert (schema == {"$ref": "#/components/schemas/Error"}) == (status != "200")
    assert document["components"]["securitySchemes"] == {"PIN": {"type": "http", "scheme": "basic"}}
    schemas = document["components"]["schemas"]
    assert schemas["Error"]["required"] == list(schemas["Error"]["properties"]) == ["remark"]
    assert set(re.findall(r"#/components/schemas/(\w+)", str(document))) == set(schemas)
    payload = paths["/tarik"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(payload["required"]) == set(payload["properties"]) == {"no_rekening", "nominal"}
    assert all(field["examples"] for field in payload["properties"].values())
    (key,), (before, limit) = paths["/tarik"]["parameters"], paths["/mutasi"]["parameters"]
    asked = [(p["in"], p["name"]) for p in (key, before, limit) if not p.get("required")]
    assert asked == [("header", "Idempotency-Key"), ("query", "sebelum"), ("query", "batas")]
    assert key["schema"]["pattern"] == "^[ -~]{1,255}$"
    assert limit["schema"].items() >= {"minimum": 1, "maximum": 100, "default": 20}.items()
    defaults = {parameter["name"]: parameter["schema"]["default"] for parameter in (before, limit)}
    assert (
        httpx.get(f"{url}/mutasi", params=defaults, auth=("1234567890", "123456")).status_code
        == 200
    )
