"""One trace from the request to the mutation, over both services, as a collector receives it."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from conftest import SECRETS, Nasabah, Servers, eventually, log_lines, new_servers
from dev.local import HOST, Service, free_port

CHAIN = ("POST /tabung", "send mutasi", "process mutasi")
BATCHES = ("commit transaksi", "insert mutasi")


def attributes(pairs: Any) -> dict[str, Any]:
    """The attributes of a span or a resource as plain values."""

    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, pair.value.WhichOneof("value") or "string_value")

    return {pair.key: value(pair) for pair in pairs}


@dataclass(frozen=True)
class Seen:
    """A span as it was received."""

    span: Span
    service: str
    texts: str  # everything in it that can be read

    @property
    def attributes(self) -> dict[str, Any]:
        return attributes(self.span.attributes)


class Collector(ThreadingHTTPServer):
    """Receives spans by OTLP over HTTP (https://opentelemetry.io/docs/specs/otlp/#otlphttp)."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        super().__init__((HOST, 0), Receiver)

    def take(self, body: bytes) -> None:
        for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = attributes(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    told = [resource, attributes(span.attributes), span.name, span.status.message]
                    told += [(event.name, attributes(event.attributes)) for event in span.events]
                    told += [attributes(link.attributes) for link in span.links]
                    self.seen.append(Seen(span, resource["service.name"], repr(told)))

    def trace(self, trace_id: bytes) -> dict[str, Seen]:
        """The spans of a trace by their names."""
        return {s.span.name: s for s in list(self.seen) if s.span.trace_id == trace_id}

    def chain(self, trace_id: str) -> list[Seen]:
        """A deposit's trace from the request to the mutation, once it is whole: nothing else is in it."""
        trace = eventually(lambda: len(t := self.trace(bytes.fromhex(trace_id))) >= len(CHAIN) and t)
        assert sorted(trace) == sorted(CHAIN)
        return [trace[name] for name in CHAIN]


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        self.server.take(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


def line(no_rekening: str, service: Service, message: str) -> dict[str, Any]:
    """The one log line with this message on the account."""
    masked = f"******{no_rekening[-4:]}"
    (entry,) = eventually(lambda: [e for e in log_lines(service, message) if e["no_rekening"] == masked])
    return dict(entry)


@dataclass(frozen=True)
class Bank:
    servers: Servers
    transaksi: Service
    mutasi: Service


@contextmanager
def traced(servers: Servers, port: int) -> Iterator[Bank]:
    """Both services as in the images, with the collector on this port."""
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    services = {
        name: servers.service(
            name,
            python=[str(instrument), sys.executable],
            environment={
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_METRICS_EXPORTER": "none",
                "OTEL_LOGS_EXPORTER": "none",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{HOST}:{port}",
                "OTEL_EXPORTER_OTLP_TIMEOUT": "2",
                "OTEL_BSP_SCHEDULE_DELAY": "200",
                "OTEL_SERVICE_NAME": name,
            },
        )
        for name in ("transaksi", "mutasi")
    }
    with ExitStack() as stack:
        for service in services.values():
            stack.callback(service.stop)
            service.start()
        yield Bank(servers, **services)
        assert [service.stop(timeout=8) for service in services.values()] == [0, 0]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with new_servers() as started:
        yield started


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as listening:
        thread = Thread(target=listening.serve_forever, args=[0.05])
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def bank(servers: Servers, collector: Collector) -> Iterator[Bank]:
    with traced(servers, collector.server_port) as both:
        yield both


@pytest.fixture
def ani(bank: Bank, nasabah: Callable[..., Nasabah]) -> Nasabah:
    return nasabah(bank.transaksi.url, bank.servers.database.open_account())


def test_one_deposit_is_one_trace_from_the_request_to_the_mutation(
    bank: Bank, collector: Collector, ani: Nasabah
) -> None:
    assert ani.tabung(50_000).status_code == 200
    accepted = line(ani.no_rekening, bank.transaksi, "movement accepted")
    chain = collector.chain(accepted["trace_id"])
    request, send, process = chain
    assert [s.service for s in chain] == ["transaksi", "transaksi", "mutasi"]
    assert [s.span.kind for s in chain] == [Span.SPAN_KIND_SERVER, Span.SPAN_KIND_PRODUCER, Span.SPAN_KIND_CONSUMER]
    assert [s.span.parent_span_id for s in chain] == [b"", request.span.span_id, send.span.span_id]
    for s in chain:
        assert s.span.start_time_unix_nano < s.span.end_time_unix_nano
        assert s.attributes["no_rekening"] == f"******{ani.no_rekening[-4:]}"
        assert (s.attributes["jenis_transaksi"], s.attributes["nominal"]) == ("tabung", 50_000)
    assert request.attributes["http.route"] == "/tabung"
    assert request.attributes["http.response.status_code"] == 200
    for s, operation in ((send, "send"), (process, "process")):
        assert s.attributes["messaging.system"] == "redis"
        assert s.attributes["messaging.destination.name"] == "mutasi"
        assert s.attributes["messaging.operation.name"] == operation
        assert s.attributes["messaging.operation.type"] == operation
        assert s.attributes["id_transaksi"] == accepted["id_transaksi"]


def test_the_batches_are_traces_of_their_own_linked_to_the_request(
    bank: Bank, collector: Collector, ani: Nasabah
) -> None:
    assert ani.tabung(1).status_code == 200
    accepted = line(ani.no_rekening, bank.transaksi, "movement accepted")
    request, send, _ = collector.chain(accepted["trace_id"])
    for name, service, linked in ((BATCHES[0], "transaksi", request), (BATCHES[1], "mutasi", send)):

        def batch(link: bytes = linked.span.span_id) -> list[Seen]:
            return [s for s in list(collector.seen) if link in {one.span_id for one in s.span.links}]

        (found,) = eventually(batch)
        assert (found.span.name, found.service, found.span.parent_span_id) == (name, service, b"")
        assert [link.trace_id for link in found.span.links] == [request.span.trace_id]
        assert found.attributes["messaging.batch.message_count"] == 1
        assert list(collector.trace(found.span.trace_id)) == [name]


def test_the_trace_of_a_client_is_continued(collector: Collector, ani: Nasabah) -> None:
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    assert ani.tabung(1, traceparent=f"00-{trace_id}-{span_id}-01").status_code == 200
    assert collector.chain(trace_id)[0].span.parent_span_id == bytes.fromhex(span_id)


def test_what_a_client_wants_no_trace_of_has_none(bank: Bank, collector: Collector, ani: Nasabah) -> None:
    traced, untraced = "1af7651916cd43dd8448eb211c80319c", "2af7651916cd43dd8448eb211c80319c"
    assert ani.tabung(1, traceparent=f"00-{untraced}-b7ad6b7169203331-00").status_code == 200
    assert ani.tabung(1, traceparent=f"00-{traced}-b7ad6b7169203331-01").status_code == 200
    collector.chain(traced)  # is received, and so would be what came before it
    assert collector.trace(bytes.fromhex(untraced)) == {}
    bank.servers.database.audit()


def test_the_log_lines_of_request_and_mutation_name_their_spans(bank: Bank, collector: Collector, ani: Nasabah) -> None:
    assert ani.tabung(1).status_code == 200
    accepted = line(ani.no_rekening, bank.transaksi, "movement accepted")
    stored = line(ani.no_rekening, bank.mutasi, "mutation stored")
    request, _, process = collector.chain(accepted["trace_id"])
    for entry, s in ((accepted, request), (stored, process)):
        assert (entry["trace_id"], entry["span_id"]) == (s.span.trace_id.hex(), s.span.span_id.hex())


def test_a_refusal_is_traced_and_logged_alike(bank: Bank, collector: Collector, ani: Nasabah) -> None:
    assert ani.tarik(1).status_code == 400
    refused = line(ani.no_rekening, bank.transaksi, "request refused")
    trace = eventually(lambda: collector.trace(bytes.fromhex(refused["trace_id"])))
    assert list(trace) == ["POST /tarik"]
    assert trace["POST /tarik"].attributes["http.response.status_code"] == 400


def test_no_span_gives_away_a_secret(bank: Bank, collector: Collector, ani: Nasabah) -> None:
    assert ani.tabung(1, idempotency_key="rahasia").status_code == 200
    database = bank.servers.database
    database("ALTER TABLE transaksi ADD CONSTRAINT uji CHECK (nominal <> 666) NOT VALID")
    try:
        assert ani.tabung(666).status_code == 503  # whose error's text prints the row
    finally:
        database("ALTER TABLE transaksi DROP CONSTRAINT uji")
    assert ani.post("/tabung", 1, no_rekening="1234567890").status_code == 400
    assert httpx.post(f"{bank.transaksi.url}/tabung", auth=(ani.no_rekening, "098765")).status_code == 401
    last = eventually(lambda: [e for e in log_lines(bank.transaksi, "request refused") if e["status"] == 401])
    eventually(lambda: collector.trace(bytes.fromhex(last[-1]["trace_id"])))
    for s in list(collector.seen):
        for kind, form in (SECRETS | {"another": "(?i)rahasia|authorization|098765"}).items():
            assert not re.search(form, s.texts), f"{kind} in {s.texts}"


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.long)])
def test_who_is_idle_sends_nothing(bank: Bank, collector: Collector, ani: Nasabah, seconds: float) -> None:
    assert ani.tabung(1).status_code == 200
    accepted = line(ani.no_rekening, bank.transaksi, "movement accepted")
    trace_id = bytes.fromhex(accepted["trace_id"])

    def about_the_deposit() -> list[str]:
        spans = [s.span for s in list(collector.seen)]
        return sorted(s.name for s in spans if trace_id in {s.trace_id, *(link.trace_id for link in s.links)})

    eventually(lambda: about_the_deposit() == sorted(CHAIN + BATCHES))
    before = len(collector.seen)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert httpx.get(f"{bank.transaksi.url}/health").status_code == 200
        time.sleep(0.1)
    assert len(collector.seen) == before


def test_a_collector_that_is_away_disturbs_nothing(nasabah: Callable[..., Nasabah]) -> None:
    with new_servers() as servers, traced(servers, free_port()) as bank:
        ani = nasabah(bank.transaksi.url, servers.database.open_account())
        for _ in range(20):
            assert ani.tabung(1).status_code == 200
        servers.database.audit()
        for service in (bank.transaksi, bank.mutasi):
            assert service.stop(timeout=8) == 0
            complaints = [e for e in log_lines(service) if e["logger"].startswith("opentelemetry")]
            assert 1 <= len(complaints) < 20


def test_without_the_sdk_there_is_no_trace(nasabah: Callable[..., Nasabah]) -> None:
    with new_servers() as servers, servers.stream as stream:
        with servers.service("transaksi") as transaksi:
            ani = nasabah(transaksi.url, servers.database.open_account())
            traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            assert ani.tabung(1, traceparent=traceparent).status_code == 200
            ((_, message),) = eventually(lambda: stream.xrange("mutasi"))
        assert b"traceparent" not in message
        (accepted,) = log_lines(transaksi, "movement accepted")
        assert not {"trace_id", "span_id"} & accepted.keys()
