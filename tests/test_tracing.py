"""One trace from the request to the mutation, over both services, as a collector receives it."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from conftest import SECRETS, Customer, Servers, eventually, log_lines, new_servers
from dev.local import HOST, Service, free_port

Customers = Callable[..., Customer]

CHAIN = ["POST /tabung", "send mutasi", "process mutasi"]
KINDS = [Span.SPAN_KIND_SERVER, Span.SPAN_KIND_PRODUCER, Span.SPAN_KIND_CONSUMER]
INSTRUMENTED = (str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable)
OTEL = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
OTEL |= {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
OTEL |= {"OTEL_BSP_SCHEDULE_DELAY": "100"}


class Collector(ThreadingHTTPServer):
    """Receives spans by OTLP over HTTP (https://opentelemetry.io/docs/specs/otlp/#otlphttp)."""

    def __init__(self) -> None:
        super().__init__((HOST, 0), Receiver)
        self.spans: list[tuple[str, Span]] = []  # with their services

    def trace(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace by name."""
        return {span.name: span for _, span in self.spans if span.trace_id.hex() == trace_id}

    def chain(self, trace_id: str) -> list[Span]:
        """The spans of a deposit's trace, once all are there and nothing else."""
        eventually(lambda: self.trace(trace_id).keys() == set(CHAIN))
        return [self.trace(trace_id)[name] for name in CHAIN]


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = attributes(one.resource)["service.name"]
            self.server.spans += [(service, span) for scope in one.scope_spans for span in scope.spans]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


def attributes(of: Any) -> dict[str, Any]:
    values = {pair.key: pair.value for pair in of.attributes}
    return {key: getattr(v, v.WhichOneof("value") or "string_value") for key, v in values.items()}


class Bank(NamedTuple):
    servers: Servers
    collector: Collector
    transaksi: Service
    mutasi: Service


@contextmanager
def traced(servers: Servers, port: int) -> Iterator[list[Service]]:
    """Both services, instrumented as in their images, with a collector on this port."""
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{HOST}:{port}"}
    services = []
    for name, *options in (("transaksi", "--resend-after", "1"), ("mutasi",)):
        otel = OTEL | endpoint | {"OTEL_SERVICE_NAME": name}
        services.append(servers.service(name, *options, python=INSTRUMENTED, environment=otel))
    with services[0], services[1]:
        yield services
        assert [service.stop(timeout=8) for service in services] == [0, 0]


@pytest.fixture(scope="module")
def bank() -> Iterator[Bank]:
    with new_servers() as servers, Collector() as collector:
        Thread(target=collector.serve_forever, args=[0.05], daemon=True).start()
        with traced(servers, collector.server_port) as services:
            yield Bank(servers, collector, *services)
        collector.shutdown()


@pytest.fixture
def ani(bank: Bank, customer: Customers) -> Customer:
    return customer(bank.transaksi.url, bank.servers.database.open_account())


def line(service: Service, message: str, who: Customer) -> dict[str, Any]:
    """The only log line with this message about a customer."""
    masked = f"******{who.no_rekening[-4:]}"
    (entry,) = eventually(lambda: [e for e in log_lines(service, message) if masked in e.values()])
    return dict(entry)


def test_deposit_is_one_trace_over_both_services(bank: Bank, ani: Customer) -> None:
    assert ani.deposit(50_000).status_code == 200
    accepted = line(bank.transaksi, "movement accepted", ani)
    stored = line(bank.mutasi, "mutation stored", ani)
    request, send, process = chain = bank.collector.chain(accepted["trace_id"])
    assert [span.kind for span in chain] == KINDS
    assert [span.parent_span_id for span in chain] == [b"", request.span_id, send.span_id]
    services = {span.span_id: service for service, span in bank.collector.spans}
    assert [services[span.span_id] for span in chain] == ["transaksi", "transaksi", "mutasi"]
    facts = {"no_rekening": accepted["no_rekening"], "jenis_transaksi": "tabung", "nominal": 50_000}
    assert all(attributes(span).items() >= facts.items() for span in chain)
    for entry, span in ((accepted, request), (stored, process)):
        assert (entry["trace_id"], entry["span_id"]) == (span.trace_id.hex(), span.span_id.hex())


def test_trace_of_the_client_is_continued_if_it_is_sampled(bank: Bank, ani: Customer) -> None:
    parent, unsampled, sampled = "b7ad6b7169203331", f"{1:032x}", f"{2:032x}"
    assert ani.deposit(1, traceparent=f"00-{unsampled}-{parent}-00").status_code == 200
    assert ani.deposit(1, traceparent=f"00-{sampled}-{parent}-01").status_code == 200
    assert bank.collector.chain(sampled)[0].parent_span_id.hex() == parent
    assert bank.collector.trace(unsampled) == {}  # its spans would have come earlier


def test_movement_that_is_sent_again_keeps_its_trace(bank: Bank, ani: Customer) -> None:
    bank.servers.stream.config_set("maxmemory", 1)  # Redis refuses every entry
    try:
        assert ani.deposit(1).status_code == 200
        eventually(lambda: log_lines(bank.transaksi, "sending to the stream failed"))
    finally:
        bank.servers.stream.config_set("maxmemory", 0)
    bank.collector.chain(line(bank.transaksi, "movement accepted", ani)["trace_id"])


def test_refusals_are_traced_and_no_span_contains_a_secret(
    bank: Bank, ani: Customer, customer: Customers
) -> None:
    bank.servers.database("ALTER TABLE transaksi ADD CONSTRAINT test CHECK (nominal <> 666) NOT VALID")
    refused = ani.deposit(666, idempotency_key="confidential")  # PostgreSQL's error prints the row
    bank.servers.database("ALTER TABLE transaksi DROP CONSTRAINT test")
    stranger = customer(bank.transaksi.url, "0987654321", "098765")
    assert (refused.status_code, stranger.deposit(1).status_code) == (503, 401)
    for who, status in ((ani, 503), (stranger, 401)):
        trace_id = line(bank.transaksi, "request refused", who)["trace_id"]
        (span,) = eventually(partial(bank.collector.trace, trace_id)).values()
        assert attributes(span)["http.response.status_code"] == status
    forms = [*SECRETS.values(), "(?i)confidential|authorization|098765"]
    for _, span in bank.collector.spans:
        texts = [f"{part.name} {attributes(part)}" for part in (span, *span.events)]
        text = "\n".join([span.status.message, *texts])
        assert not any(re.search(form, text) for form in forms), text


def test_unreachable_collector_disturbs_nothing(bank: Bank, customer: Customers) -> None:
    with traced(bank.servers, free_port()) as (transaksi, _):
        ani = customer(transaksi.url, bank.servers.database.open_account())
        assert [ani.deposit(1).status_code for _ in range(20)] == [200] * 20
        bank.servers.database.audit()
    complaints = [e for e in log_lines(transaksi) if e["logger"].startswith("opentelemetry")]
    assert 1 <= len(complaints) < 20


def test_without_the_sdk_the_message_has_no_traceparent(bank: Bank, customer: Customers) -> None:
    with bank.servers.service("transaksi") as transaksi:
        ani = customer(transaksi.url, bank.servers.database.open_account())
        assert ani.deposit(1, traceparent=f"00-{3:032x}-b7ad6b7169203331-01").status_code == 200
        for service, message in ((transaksi, "movement accepted"), (bank.mutasi, "mutation stored")):
            assert not {"trace_id", "span_id"} & line(service, message, ani).keys()
