"""One trace from the request to the mutation, over both services, as a collector receives it."""

import re
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace as Bank
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from dev.local import HOST, ROOT, Service
from tests.support import SECRETS, Customer, eventually, log_lines, new_servers

Customers = Callable[..., Customer]
CHAIN = ["transaksi: POST /tabung", "transaksi: send mutasi", "mutasi: process mutasi"]
KINDS = [Span.SPAN_KIND_SERVER, Span.SPAN_KIND_PRODUCER, Span.SPAN_KIND_CONSUMER]
INSTRUMENTED = (str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable)
OTEL = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_SCHEDULE_DELAY": "100"}
SPANS: list[tuple[str, Span]] = []  # all that the collector has received, by service and name


class Collector(BaseHTTPRequestHandler):
    """Receives spans by OTLP over HTTP (https://opentelemetry.io/docs/specs/otlp/#otlphttp)."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            name = attributes(one.resource)["service.name"]
            SPANS.extend(
                (f"{name}: {span.name}", span) for scope in one.scope_spans for span in scope.spans
            )
        self.send_response(200)
        self.end_headers()


def attributes(of: Any) -> dict[str, Any]:
    return {
        p.key: getattr(p.value, p.value.WhichOneof("value") or "string_value")
        for p in of.attributes
    }


def spans(trace_id: str, *expected: str) -> list[Span]:
    """The spans of a trace, once all that are expected are there and nothing else."""
    eventually(
        lambda: {name for name, span in SPANS if span.trace_id.hex() == trace_id} == set(expected)
    )
    found = {name: span for name, span in SPANS if span.trace_id.hex() == trace_id}
    return [found[name] for name in expected]


@pytest.fixture(scope="module")
def bank() -> Iterator[Bank]:
    """Both services, instrumented as in their images."""
    with new_servers() as servers, ThreadingHTTPServer((HOST, 0), Collector) as collector:
        Thread(target=collector.serve_forever, args=[0.05], daemon=True).start()
        otel = OTEL | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{HOST}:{collector.server_port}"}
        services = []
        for name, *options in (("transaksi", "--resend-after", "1"), ("mutasi",)):
            image = dict(re.findall(r"(OTEL_\w+)=(\S+)", (ROOT / name / "Dockerfile").read_text()))
            services.append(
                servers.service(name, *options, python=INSTRUMENTED, environment=image | otel)
            )
        with services[0], services[1]:
            yield Bank(
                servers=servers, collector=collector, transaksi=services[0], mutasi=services[1]
            )
        collector.shutdown()


@pytest.fixture
def ani(bank: Bank, customer: Customers) -> Customer:
    return customer(bank.transaksi.url, bank.servers.database.open_account())


def line(service: Service, message: str, account: str) -> dict[str, Any]:
    """The only log line with this message about an account."""
    masked = f"******{account[-4:]}"
    (entry,) = eventually(lambda: [e for e in log_lines(service, message) if masked in e.values()])
    return dict(entry)


@pytest.mark.parametrize("parent", ["", "b7ad6b7169203331"])
def test_deposit_is_one_trace_over_both_services(bank: Bank, ani: Customer, parent: str) -> None:
    """The second time the trace is continued from a client's, and the movement has to be sent again."""
    bank.servers.stream.config_set("maxmemory", 1 if parent else 0)  # 1: Redis refuses every entry
    headers = {"traceparent": f"00-{1:032x}-{parent}-01"} if parent else {}
    assert ani.deposit(50_000, **headers).status_code == 200
    if parent:
        eventually(lambda: log_lines(bank.transaksi, "sending to the stream failed"))
        bank.servers.stream.config_set("maxmemory", 0)
    accepted = line(bank.transaksi, "movement accepted", ani.no_rekening)
    stored = line(bank.mutasi, "mutation stored", ani.no_rekening)
    ids = (accepted["trace_id"], *CHAIN)
    eventually(
        lambda: spans(*ids)[1].span_id == spans(*ids)[2].parent_span_id
    )  # not the failed send
    request, send, process = chain = spans(*ids)
    assert [span.kind for span in chain] == KINDS
    assert [span.parent_span_id for span in chain] == [
        bytes.fromhex(parent),
        request.span_id,
        send.span_id,
    ]
    facts = {"no_rekening": accepted["no_rekening"], "jenis_transaksi": "tabung", "nominal": 50_000}
    assert all(attributes(span).items() >= facts.items() for span in chain)
    for entry, span in ((accepted, request), (stored, process)):
        assert (entry["trace_id"], entry["span_id"]) == (span.trace_id.hex(), span.span_id.hex())


def test_refusals_are_traced_but_nothing_unsampled_and_no_secret(bank: Bank, ani: Customer) -> None:
    assert ani.deposit(1, traceparent=f"00-{2:032x}-b7ad6b7169203331-00").status_code == 200
    bank.servers.database(
        "ALTER TABLE transaksi ADD CONSTRAINT test CHECK (nominal <> 666) NOT VALID"
    )
    ani.deposit(666, idempotency_key="confidential")  # PostgreSQL's error prints the row
    bank.servers.database("ALTER TABLE transaksi DROP CONSTRAINT test")
    ani.client.get("/saldo", auth=("0987654321", "098765"))
    for account, status, name in (
        (ani.no_rekening, 503, "POST /tabung"),
        ("0987654321", 401, "GET"),
    ):
        (span,) = spans(
            line(bank.transaksi, "request refused", account)["trace_id"], f"transaksi: {name}"
        )
        assert attributes(span)["http.response.status_code"] == status
    assert spans(f"{2:032x}") == []  # they would have come earlier
    for form in (*SECRETS.values(), "(?i)confidential|authorization|098765"):
        assert not [span for _, span in SPANS if re.search(form, str(span))]


def test_without_the_sdk_the_message_has_no_traceparent(bank: Bank, customer: Customers) -> None:
    with bank.servers.service("transaksi") as transaksi:
        ani = customer(transaksi.url, bank.servers.database.open_account())
        assert ani.deposit(1, traceparent=f"00-{3:032x}-b7ad6b7169203331-01").status_code == 200
        for service, message in (
            (transaksi, "movement accepted"),
            (bank.mutasi, "mutation stored"),
        ):
            assert not {"trace_id", "span_id"} & line(service, message, ani.no_rekening).keys()


def test_unreachable_collector_disturbs_nothing(bank: Bank, ani: Customer) -> None:
    """The last test: it ends the collector, then the services."""
    bank.collector.shutdown()
    bank.collector.server_close()
    assert [ani.deposit(1).status_code for _ in range(20)] == [200] * 20
    bank.servers.database.audit()
    assert [bank.transaksi.stop(timeout=8), bank.mutasi.stop(timeout=8)] == [0, 0]
    complaints = [e for e in log_lines(bank.transaksi) if e["logger"].startswith("opentelemetry")]
    assert 1 <= len(complaints) < 20
