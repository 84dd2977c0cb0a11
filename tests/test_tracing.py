"""One trace from the request to the booked movement, as a collector receives it."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from common.stream import DEAD_LETTERS, STREAM
from dev.local import HOST, ROOT, Service
from tests.load import hung
from tests.support import (
    SECRETS,
    Customer,
    Servers,
    eventually,
    log_line,
    log_lines,
    new_servers,
    running,
)

Customers = Callable[..., Customer]
CHAIN = ["transaksi: POST /tabung", "transaksi: send mutasi", "mutasi: process mutasi"]
KINDS = [Span.SPAN_KIND_SERVER, Span.SPAN_KIND_PRODUCER, Span.SPAN_KIND_CONSUMER]
INSTRUMENTED = (str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable)
OTEL = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_BSP_SCHEDULE_DELAY": "100",
    "OTEL_METRICS_EXPORTER": "otlp",
    "OTEL_METRIC_EXPORT_INTERVAL": "200",
}
CLIENT_SPAN = "b7ad6b7169203331"
SPANS: list[tuple[str, Span]] = []  # all that the collector has received, by service and name
METRICS: dict[str, float] = {}  # the latest value of each


class Collector(BaseHTTPRequestHandler):
    """Receives spans by OTLP over HTTP (https://opentelemetry.io/docs/specs/otlp/#otlphttp)."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/metrics":
            METRICS.update(latest_values(body))
            body = b""
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            name = attributes(one.resource)["service.name"]
            received = [span for scope in one.scope_spans for span in scope.spans]
            SPANS.extend((f"{name}: {span.name}", span) for span in received)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Write nothing to stderr."""


@dataclass
class Bank:
    """Both services, instrumented as in their images, and the collector of their spans."""

    servers: Servers
    collector: ThreadingHTTPServer
    transaksi: Service
    mutasi: Service


QUICK = ("transaksi", "--resend-after", "1", "--request-timeout", "3")


@pytest.fixture(scope="module")
def bank() -> Iterator[Bank]:
    with new_servers() as servers, ThreadingHTTPServer((HOST, 0), Collector) as collector:
        Thread(target=collector.serve_forever, args=[0.05], daemon=True).start()
        otel = OTEL | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{HOST}:{collector.server_port}"}
        services = []
        for name, *options in (QUICK, ("mutasi",)):
            image = dict(re.findall(r"(OTEL_\w+)=(\S+)", (ROOT / name / "Dockerfile").read_text()))
            how: dict[str, Any] = {"python": INSTRUMENTED, "environment": image | otel}
            services.append(servers.service(name, *options, **how))
        with running(*services):
            yield Bank(servers, collector, *services)
        collector.shutdown()


@pytest.fixture
def ani(bank: Bank, customer: Customers) -> Customer:
    return customer(bank.transaksi.url, bank.servers.database.open_account())


def attributes(of: Any) -> dict[str, Any]:
    values = {one.key: one.value for one in of.attributes}
    return {
        key: getattr(value, value.WhichOneof("value") or "string_value")
        for key, value in values.items()
    }


def latest_values(body: bytes) -> dict[str, float]:
    """Return the value of each gauge, and how many requests each histogram has counted."""
    values = {}
    for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            for point in metric.gauge.data_points:
                values[metric.name] = point.as_double or point.as_int
            if points := metric.histogram.data_points:
                values[metric.name] = sum(point.count for point in points)
    return values


def spans(trace_id: str, *expected: str) -> list[Span]:
    """Return the spans of a trace, when all that are expected are there and nothing else."""

    def found() -> dict[str, Span]:
        return {name: span for name, span in SPANS if span.trace_id.hex() == trace_id}

    eventually(lambda: found().keys() == set(expected))
    return [found()[name] for name in expected]


def traceparent(number: int, sampled: bool) -> str:
    """Return a client's traceparent for the trace of this number."""
    return f"00-{number:032x}-{CLIENT_SPAN}-{sampled:02}"


def line(service: Service, message: str, account: str) -> dict[str, Any]:
    return log_line(service, message, no_rekening=f"******{account[-4:]}")


@pytest.mark.parametrize("parent", ["", CLIENT_SPAN])
def test_a_deposit_is_one_trace_over_both_services(bank: Bank, ani: Customer, parent: str) -> None:
    headers = {"traceparent": traceparent(1, sampled=True)} if parent else {}
    assert ani.deposit(50_000, **headers).status_code == 200
    answered = line(bank.transaksi, "request answered", ani.no_rekening)
    stored = line(bank.mutasi, "mutation stored", ani.no_rekening)

    request, send, process = chain = spans(answered["trace_id"], *CHAIN)

    assert [span.kind for span in chain] == KINDS
    parents = [bytes.fromhex(parent), request.span_id, send.span_id]
    assert [span.parent_span_id for span in chain] == parents
    assert answered["trace_id"] == (f"{1:032x}" if parent else stored["trace_id"])
    names = ("no_rekening", "jenis_transaksi", "nominal", "id_transaksi")
    movement = {name: stored[name] for name in names}
    assert all(attributes(span).items() >= movement.items() for span in chain)
    for entry, span in ((answered, request), (stored, process)):
        assert (entry["trace_id"], entry["span_id"]) == (span.trace_id.hex(), span.span_id.hex())


def test_a_resent_movement_continues_the_trace_of_its_request(bank: Bank, ani: Customer) -> None:
    bank.servers.stream.config_set("maxmemory", 1)  # Redis refuses every entry
    assert ani.deposit(1).status_code == 200
    eventually(lambda: log_lines(bank.transaksi, "sending to the stream failed"))
    bank.servers.stream.config_set("maxmemory", 0)
    trace_id = line(bank.mutasi, "mutation stored", ani.no_rekening)["trace_id"]

    request, _, process = spans(trace_id, *CHAIN)

    def sent() -> list[Span]:  # the last time
        return [span for _, span in SPANS if span.span_id == process.parent_span_id]

    assert eventually(sent)[0].parent_span_id == request.span_id


def test_a_refusal_is_traced(bank: Bank, ani: Customer) -> None:
    assert ani.withdraw(1).status_code == 400
    refused = line(bank.transaksi, "request refused", ani.no_rekening)

    (span,) = spans(refused["trace_id"], "transaksi: POST /tarik")

    assert attributes(span)["http.response.status_code"] == 400
    assert attributes(span)["remark"] == "Saldo tidak mencukupi."


def test_a_timeout_is_traced(bank: Bank, ani: Customer) -> None:
    assert ani.client.get("/saldo").status_code == 200  # the PIN is cached, a connection open
    with hung(bank.servers.database.server):
        assert ani.client.get("/saldo").status_code == 503
    failed = line(bank.transaksi, "request failed", ani.no_rekening)

    (span,) = spans(failed["trace_id"], "transaksi: GET /saldo")

    assert attributes(span)["reason"] == "timeout"


def test_unsampled_requests_and_open_paths_are_not_traced(ani: Customer) -> None:
    assert ani.deposit(1, traceparent=traceparent(2, sampled=False)).status_code == 200
    parent = {"traceparent": traceparent(4, sampled=True)}
    assert ani.client.get("/health", headers=parent).status_code == 200

    assert ani.deposit(1, traceparent=traceparent(3, sampled=True)).status_code == 200

    spans(f"{3:032x}", *CHAIN)
    assert spans(f"{2:032x}") == spans(f"{4:032x}") == []  # they would have come earlier


def test_no_span_has_a_secret_or_the_text_of_an_error(bank: Bank, ani: Customer) -> None:
    change = "ALTER TABLE transaksi {} CONSTRAINT uji".format
    bank.servers.database(change("ADD") + " CHECK (nominal <> 666) NOT VALID")
    ani.deposit(666, idempotency_key="confidential")  # PostgreSQL's error prints the row
    bank.servers.database(change("DROP"))
    ani.client.get("/saldo", auth=("0987654321", "098765"))
    failed = line(bank.transaksi, "request failed", ani.no_rekening)
    refused = line(bank.transaksi, "request refused", "0987654321")

    spans(failed["trace_id"], "transaksi: POST /tabung")
    spans(refused["trace_id"], "transaksi: GET")

    for form in (*SECRETS.values(), r"(?i)confidential|authorization|\b098765\b|failing row"):
        assert not [span for _, span in SPANS if re.search(form, str(span))]


def test_gauges_tell_what_is_not_booked(bank: Bank, ani: Customer) -> None:
    stream = bank.servers.stream
    letters = stream.xlen(DEAD_LETTERS)
    names = [f"tabungan.{name}" for name in ("unbooked.count", "stream.length", "dead_letters")]

    with hung(bank.mutasi):
        assert [ani.deposit(1).status_code for _ in range(3)] == [200] * 3
        stream.xadd(STREAM, {"nominal": "x"})
        eventually(lambda: [METRICS.get(name) for name in names] == [3, 4, letters])
        eventually(lambda: METRICS["tabungan.unbooked.age"] > 0.5)
    eventually(lambda: [METRICS[name] for name in names] == [0, 0, letters + 1])

    assert METRICS["tabungan.unbooked.age"] == METRICS["tabungan.waiting"] == 0
    assert METRICS["http.server.request.duration"] >= 3


def test_an_unreachable_collector_disturbs_nothing(bank: Bank, ani: Customer) -> None:
    """The last test: it ends the collector, then the services."""
    bank.collector.shutdown()
    bank.collector.server_close()

    assert [ani.deposit(1).status_code for _ in range(20)] == [200] * 20
    bank.servers.database.audit()
    assert [bank.transaksi.stop(timeout=8), bank.mutasi.stop(timeout=8)] == [0, 0]

    complaints = log_lines(bank.transaksi, "(?i).*export.*")
    assert 1 <= len(complaints) < 20
