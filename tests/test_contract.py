"""Every row of the HTTP contract: what is sent byte for byte, and the documented answer to it."""

import json
import socket
import time
from base64 import b64encode
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from itertools import chain, repeat
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import PIN, PIN_HASH, Database, Servers

Header = tuple[bytes, bytes]

PAYLOAD = "Payload bukan JSON yang sah."
NO_REKENING = "no_rekening harus teks berisi 10 sampai 16 angka."
NOMINAL = "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah."
KEY = "Idempotency-Key harus 1 sampai 255 karakter ASCII yang tercetak."
PIN_SALAH = "Nomor rekening atau PIN salah."
TIDAK_DIKENALI = "Nomor rekening tidak dikenali."
TERLALU_BESAR = "Payload melebihi 4 KiB."
BUKAN_JSON = "Content-Type harus application/json."
ALAMAT = "Alamat tidak dikenali."
METODE = "Metode tidak diizinkan untuk alamat ini."
TERLAMBAT = "Payload tidak diterima lengkap pada waktunya."

ACCOUNT = b"4000000001"
JSON = (b"Content-Type", b"application/json")
CHUNKED = (b"Transfer-Encoding", b"chunked")
OK = b'{"no_rekening": "%s", "nominal": 1}' % ACCOUNT


def basic(credentials: bytes, scheme: bytes = b"Basic ") -> Header:
    return b"Authorization", scheme + b64encode(credentials)


RIGHT = ACCOUNT + b":" + PIN.encode()
AUTH = basic(RIGHT)


def nominal(value: bytes) -> bytes:
    return b'{"no_rekening": "%s", "nominal": %s}' % (ACCOUNT, value)


def no_rekening(value: str) -> bytes:
    return b'{"no_rekening": %s, "nominal": 1}' % value.encode()


def of_length(length: int, start: bytes = OK) -> bytes:
    return start + b" " * (length - len(start))


class Answer:
    """What a server says to raw bytes, of which it may not want to read all."""

    def __init__(self, url: str, request: bytes, more: Iterable[bytes] = ()) -> None:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=20) as line:
            try:
                for part in chain([request], more):
                    line.sendall(part)
            except ConnectionError:
                pass  # it has answered and hung up: that answer is what we want
            with HTTPResponse(line, method=request.partition(b" ")[0].decode()) as response:
                response.begin()
                self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def remark(self) -> str:
        """The refusal's remark; there is nothing else in it."""
        content = json.loads(self.body)
        assert list(content) == ["remark"]
        return str(content["remark"])


def head(headers: Sequence[Header], method: bytes = b"POST", path: bytes = b"/tabung") -> bytes:
    lines = b"".join(b"%s: %s\r\n" % header for header in headers)
    return b"%s %s HTTP/1.1\r\nHost: bank\r\n%s\r\n" % (method, path, lines)


def ask(url: str, headers: Sequence[Header], body: bytes = b"", **line: bytes) -> Answer:
    return Answer(url, head([*headers, (b"Content-Length", b"%d" % len(body))], **line) + body)


@pytest.fixture(scope="module", autouse=True)
def _customer(servers: Servers) -> None:
    """One customer for all of them: the table is made before any server runs."""
    servers.database("SELECT buka_rekening(%s, 'Uji Kontrak', %s, 0)", ACCOUNT.decode(), PIN_HASH)


PAYLOADS: dict[str, tuple[bytes, int, str | None]] = {
    # what is sent: the answer's status, and its remark unless it is 200
    "as documented": (OK, 200, None),
    "unknown fields": (OK[:-1] + b', "catatan": "\\ud83d\\ude00", "lain": [{}]}', 200, None),
    "duplicate keys, the last right": (nominal(b"-5")[:-1] + b', "nominal": 1}', 200, None),
    "duplicate keys, the last wrong": (nominal(b"1")[:-1] + b', "nominal": -5}', 400, NOMINAL),
    "just 4 KiB": (of_length(4096), 200, None),
    "a byte more": (of_length(4097), 413, TERLALU_BESAR),
    "5 MB": (of_length(5_000_000), 413, TERLALU_BESAR),
    "the most": (nominal(b"1000000000000"), 200, None),
    "one more": (nominal(b"1000000000001"), 400, NOMINAL),
    "past 2^53": (nominal(b"9007199254740993"), 400, NOMINAL),
    "zero": (nominal(b"0"), 400, NOMINAL),
    "minus zero": (nominal(b"-0"), 400, NOMINAL),
    "negative": (nominal(b"-1"), 400, NOMINAL),
    "1.0": (nominal(b"1.0"), 400, NOMINAL),
    "a fraction": (nominal(b"0.5"), 400, NOMINAL),
    "an exponent": (nominal(b"1e3"), 400, NOMINAL),
    "1e400": (nominal(b"1e400"), 400, NOMINAL),
    "NaN": (nominal(b"NaN"), 400, NOMINAL),
    "infinity": (nominal(b"-Infinity"), 400, NOMINAL),
    "true": (nominal(b"true"), 400, NOMINAL),
    "null": (nominal(b"null"), 400, NOMINAL),
    "a string": (nominal(b'"5"'), 400, NOMINAL),
    "a list": (nominal(b"[1]"), 400, NOMINAL),
    "no nominal": (OK.partition(b",")[0] + b"}", 400, NOMINAL),
    "4,000 digits": (nominal(b"9" * 4000), 400, NOMINAL),
    "5,000 digits": (nominal(b"9" * 5000), 413, TERLALU_BESAR),
    "2,000 levels": (b"[" * 2000 + b"]" * 2000, 400, PAYLOAD),
    "20,000 levels": (b"[" * 20_000 + b"]" * 20_000, 413, TERLALU_BESAR),
    "no account": (b'{"nominal": 1}', 400, NO_REKENING),
    "an account that is a number": (no_rekening(ACCOUNT.decode()), 400, NO_REKENING),
    "an account too short": (no_rekening('"123456789"'), 400, NO_REKENING),
    "an account too long": (no_rekening('"12345678901234567"'), 400, NO_REKENING),
    "an account and a line end": (no_rekening(r'"4000000001\n"'), 400, NO_REKENING),
    "NUL": (no_rekening(r'"4000000001\u0000"'), 400, NO_REKENING),
    "an unpaired surrogate": (no_rekening(r'"\ud800"'), 400, PAYLOAD),  # no Unicode text: RFC 8259, section 8.2
    "one in an unknown field": (OK[:-1] + b', "catatan": "\\ud800"}', 400, PAYLOAD),
    "UTF-16": (OK.decode().encode("utf-16"), 400, PAYLOAD),
    "full-width digits": (no_rekening('"４０００００００００１"'), 400, NO_REKENING),  # noqa: RUF001
    "the account of another": (no_rekening('"1234567890"'), 400, TIDAK_DIKENALI),
    "an account that does not exist": (no_rekening('"9999999999"'), 400, TIDAK_DIKENALI),
    "the same with another zero": (no_rekening('"04000000001"'), 400, TIDAK_DIKENALI),
    "no body": (b"", 400, PAYLOAD),
    "half of it": (OK[:-5], 400, PAYLOAD),
    "two of them": (OK + OK, 400, PAYLOAD),
    "not UTF-8": (no_rekening('"?"').replace(b"?", b"\xff\xfe"), 400, PAYLOAD),
    "not an object": (b"[]", 400, PAYLOAD),
    "only null": (b"null", 400, PAYLOAD),
    "a form": (b"no_rekening=4000000001&nominal=1", 400, PAYLOAD),
}

HEADERS: dict[str, tuple[list[Header], int, str | None]] = {
    "scheme in lower case": ([JSON, basic(RIGHT, b"basic ")], 200, None),
    "scheme in upper case": ([JSON, basic(RIGHT, b"BASIC ")], 200, None),
    "none": ([JSON], 401, PIN_SALAH),
    "an empty one": ([JSON, (b"Authorization", b"")], 401, PIN_SALAH),
    "the scheme alone": ([JSON, (b"Authorization", b"Basic")], 401, PIN_SALAH),
    "Bearer": ([JSON, basic(RIGHT, b"Bearer ")], 401, PIN_SALAH),
    "not base64": ([JSON, (b"Authorization", b"Basic " + RIGHT)], 401, PIN_SALAH),
    "base64 without its padding": ([JSON, (AUTH[0], AUTH[1].rstrip(b"="))], 401, PIN_SALAH),
    "no colon": ([JSON, basic(RIGHT.replace(b":", b""))], 401, PIN_SALAH),
    "two of them": ([JSON, AUTH, AUTH], 401, PIN_SALAH),
    "64 kB": ([JSON, (b"Authorization", b"Basic " + b"A" * 65_536)], 401, PIN_SALAH),
    "not UTF-8": ([JSON, (b"Authorization", b"Basic \xff\xfe")], 401, PIN_SALAH),
    "not UTF-8 in base64": ([JSON, basic(b"\xff\xfe:\xff")], 401, PIN_SALAH),
    "a PIN of five digits": ([JSON, basic(ACCOUNT + b":12345")], 401, PIN_SALAH),
    "a PIN of seven digits": ([JSON, basic(ACCOUNT + b":1234567")], 401, PIN_SALAH),
    "a line end after the PIN": ([JSON, basic(RIGHT + b"\n")], 401, PIN_SALAH),
    "full-width digits": ([JSON, basic(ACCOUNT + ":１２３４５６".encode())], 401, PIN_SALAH),  # noqa: RUF001
    "a wrong PIN": ([JSON, basic(ACCOUNT + b":654321")], 401, PIN_SALAH),
    "an unknown account": ([JSON, basic(b"9999999999:123456")], 401, PIN_SALAH),
    "another kind of JSON": ([AUTH, (JSON[0], b"application/vnd.bank+json")], 200, None),
    "JSON and its charset": ([AUTH, (JSON[0], b"application/json; charset=utf-8")], 200, None),
    "no content type": ([AUTH], 415, BUKAN_JSON),
    "text": ([AUTH, (JSON[0], b"text/plain")], 415, BUKAN_JSON),
    "a form": ([AUTH, (JSON[0], b"application/x-www-form-urlencoded")], 415, BUKAN_JSON),
    "a content type that is none": ([AUTH, (JSON[0], b"\xff")], 415, BUKAN_JSON),
    "a key of 255 characters": ([JSON, AUTH, (b"Idempotency-Key", b"~" * 255)], 200, None),
    "a key of 256 characters": ([JSON, AUTH, (b"Idempotency-Key", b"~" * 256)], 400, KEY),
    "two keys": ([JSON, AUTH, *[(b"Idempotency-Key", b"dua")] * 2], 400, KEY),
    "an empty key": ([JSON, AUTH, (b"Idempotency-Key", b"")], 400, KEY),
    "a key of blanks": ([JSON, AUTH, (b"Idempotency-Key", b"  ")], 400, KEY),
    "a key with a tab": ([JSON, AUTH, (b"Idempotency-Key", b"a\tb")], 400, KEY),
    "a key that is not ASCII": ([JSON, AUTH, (b"Idempotency-Key", "é".encode())], 400, KEY),
}

EXCHANGES = [
    *(pytest.param([JSON, AUTH], *case, id=f"body: {name}") for name, case in PAYLOADS.items()),
    *(pytest.param(headers, OK, *rest, id=f"headers: {name}") for name, (headers, *rest) in HEADERS.items()),
]


def movements(database: Database) -> int:
    ((count,),) = database("SELECT count(*) FROM transaksi WHERE no_rekening = %s", ACCOUNT.decode())
    return int(count)


@pytest.mark.parametrize(("headers", "body", "status", "remark"), EXCHANGES)
def test_every_request_gets_its_documented_answer(
    url: str, database: Database, headers: list[Header], body: bytes, status: int, remark: str | None
) -> None:
    before = movements(database)
    answer = ask(url, headers, body)
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    if status == 200:
        assert list(json.loads(answer.body)) == ["saldo"]
        assert movements(database) == before + 1
    else:
        assert answer.remark == remark
        assert movements(database) == before


@pytest.mark.parametrize(
    ("method", "path", "status", "remark", "allowed"),
    [
        (b"POST", b"/setor", 404, ALAMAT, None),
        (b"POST", b"/tabung/", 404, ALAMAT, None),
        (b"GET", b"/", 404, ALAMAT, None),
        (b"GET", b"/health/", 404, ALAMAT, None),
        (b"GET", b"/%ff%00", 404, ALAMAT, None),
        (b"GET", b"/tabung", 405, METODE, "POST"),
        (b"OPTIONS", b"/tarik", 405, METODE, "POST"),
        (b"DELETE", b"/tabung?nominal=1", 405, METODE, "POST"),
    ],
)
def test_a_wrong_address_or_method_is_told_to_customers_only(
    url: str, method: bytes, path: bytes, status: int, remark: str, allowed: str | None
) -> None:
    answer = ask(url, [AUTH], method=method, path=path)
    assert (answer.status, answer.remark, answer.headers["Allow"]) == (status, remark, allowed)
    stranger = ask(url, [], method=method, path=path)
    assert (stranger.status, stranger.remark) == (401, PIN_SALAH)


@pytest.mark.parametrize("path", [b"/health", b"/docs", b"/openapi.json"])
def test_the_open_pages_may_only_be_read(url: str, path: bytes) -> None:
    answer = ask(url, [], OK, method=b"POST", path=path)
    assert (answer.status, answer.remark) == (405, METODE)


def test_a_websocket_is_no_way_around_the_pin(url: str) -> None:
    upgrade = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13")]
    answer = ask(url, [*upgrade, (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ==")], method=b"GET")
    assert (answer.status, answer.remark) == (401, PIN_SALAH)


def test_a_payload_may_come_in_chunks(url: str) -> None:
    assert Answer(url, head([JSON, AUTH, CHUNKED]) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(OK), OK)).status == 200


def test_chunks_without_end_are_cut_off_by_their_size(url: str) -> None:
    answer = Answer(url, head([JSON, AUTH, CHUNKED]), repeat(b"400\r\n%s\r\n" % of_length(1024), 5000))
    assert (answer.status, answer.remark) == (413, TERLALU_BESAR)


def test_a_payload_that_stalls_is_cut_off_at_the_time_limit(servers: Servers) -> None:
    def stall(framing: Header) -> tuple[int, str]:
        answer = Answer(service.url, head([JSON, AUTH, framing]) + b'5\r\n{"no_')
        return answer.status, answer.remark

    with servers.service("transaksi", "--request-timeout", "1") as service, ThreadPoolExecutor() as clients:
        started = time.monotonic()
        answers = list(clients.map(stall, [CHUNKED, (b"Content-Length", b"99")]))
        assert answers == [(408, TERLAMBAT)] * 2
        assert 1 <= time.monotonic() - started < 5  # the default limit
        assert ask(service.url, [JSON, AUTH], OK).status == 200
        assert service.stop() == 0


def test_a_balance_reaches_the_limit_and_not_a_rupiah_more(url: str, database: Database) -> None:
    no_rekening = database.open_account()
    database(
        """WITH jurnal AS (
            INSERT INTO transaksi (no_rekening, jenis_transaksi, nominal, saldo_akhir)
            SELECT %s, 'tabung', 1000000000000, n * 1000000000000 FROM generate_series(1, 9007) n
            RETURNING *),
        buku AS (
            INSERT INTO mutasi (id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal)
            SELECT id, no_rekening, tanggal_transaksi, jenis_transaksi, nominal FROM jurnal)
        UPDATE rekening SET saldo = 9007000000000000 WHERE no_rekening = %s""",
        *(no_rekening, no_rekening),
    )
    with httpx.Client(base_url=url, auth=(no_rekening, PIN)) as customer:

        def tabung(nominal: int) -> httpx.Response:
            return customer.post("/tabung", json={"no_rekening": no_rekening, "nominal": nominal})

        assert tabung(199_254_740_991).json() == {"saldo": 2**53 - 1}
        answer = tabung(1)
        assert (answer.status_code, answer.json()) == (400, {"remark": "Saldo akan melebihi batas."})
    assert database.saldo(no_rekening) == 2**53 - 1


# ---------------------------------------------------------------- the documentation


@pytest.fixture(scope="module")
def openapi(url: str) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
    return document


@pytest.mark.parametrize("path", ["/tabung", "/tarik"])
def test_the_documentation_tells_the_truth(openapi: dict[str, Any], path: str) -> None:
    operation = openapi["paths"][path]["post"]
    answers = operation["responses"]
    assert set(answers) == {"200", "400", "401", "408", "413", "415", "422", "503"}
    schemas = openapi["components"]["schemas"]
    assert set(schemas) == {"Permintaan", "Saldo", "Kesalahan"}  # and none of FastAPI's own
    for name in ("Permintaan", "Saldo"):
        assert all(field["examples"] for field in schemas[name]["properties"].values())
    documented = {
        (int(status), example["value"]["remark"])
        for status, answer in answers.items()
        for example in answer["content"]["application/json"].get("examples", {}).values()
    }
    assert {status for status, _ in documented} == {400, 401, 408, 413, 415, 422, 503}
    assert {(case.values[2], case.values[3]) for case in EXCHANGES} - {(200, None)} <= documented
    for status, answer in answers.items():
        name = "Saldo" if status == "200" else "Kesalahan"
        schema = answer["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{name}"}
    assert schemas["Kesalahan"]["required"] == list(schemas["Kesalahan"]["properties"]) == ["remark"]
    assert "WWW-Authenticate" in answers["401"]["headers"]
    assert "Retry-After" in answers["503"]["headers"]
    assert "Idempotent-Replayed" in answers["200"]["headers"]
    (parameter,) = operation["parameters"]
    assert (parameter["name"].lower(), parameter["in"]) == ("idempotency-key", "header")
    assert not parameter.get("required", False)
    assert parameter["schema"].items() >= {"minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"}.items()


def test_the_documentation_knows_how_to_authorize(openapi: dict[str, Any]) -> None:
    ((name, scheme),) = openapi["components"]["securitySchemes"].items()
    assert scheme == {"type": "http", "scheme": "basic"}
    secured = {path: next(iter(methods.values())).get("security") for path, methods in openapi["paths"].items()}
    assert secured == {"/tabung": [{name: []}], "/tarik": [{name: []}], "/health": None}
