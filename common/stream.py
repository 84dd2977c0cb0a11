"""The message between the services: one entry of the Redis Stream for each movement."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from common.telemetry import mask, propagator, tracer

STREAM = "mutasi"
DEAD_LETTERS = f"{STREAM}:dead-letter"
MAX_NOMINAL = 1_000_000_000_000

JenisTransaksi = Literal["tabung", "tarik"]
NoRekening = Annotated[str, Field(pattern="^[0-9]{10,16}$")]


def has_form(pattern: str) -> BeforeValidator:
    """Return a validator that refuses text of another form, before pydantic parses it.

    pydantic alone would accept "+1_0" as a number, and many forms of time.
    """

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError("malformed")
        return text

    return BeforeValidator(check)


WHOLE_NUMBER = has_form("[1-9][0-9]{0,18}")
# UTC with microseconds, as `format_time` writes it.
TIME = has_form("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}[.][0-9]{6}[+]00:00")


def format_time(time: datetime) -> str:
    """Return a time in the form of RFC 3339, with microseconds."""
    return time.isoformat(timespec="microseconds")


class MutationRequest(BaseModel, hide_input_in_errors=True):
    """A movement for service mutasi to book. `nominal` is whole rupiah, the time is UTC."""

    id_transaksi: Annotated[int, WHOLE_NUMBER, Field(lt=2**63)]
    tanggal_transaksi: Annotated[datetime, TIME]
    no_rekening: NoRekening
    jenis_transaksi: JenisTransaksi
    nominal: Annotated[int, WHOLE_NUMBER, Field(le=MAX_NOMINAL)]
    traceparent: str | None = Field(None, pattern="^[0-9a-f-]{55}$")

    @classmethod
    def from_entry(cls, fields: Mapping[bytes, bytes]) -> Self:
        """Parse a stream entry. Unknown fields are ignored.

        Raises ValueError if a field is missing, has another form, or is not UTF-8.
        """
        names = [name for name in cls.model_fields if name.encode() in fields]
        return cls.model_validate({name: fields[name.encode()].decode() for name in names})


FIELDS = tuple(MutationRequest.model_fields)


def to_entry(movement: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the stream entry of a movement, given its fields."""
    entry = {name: movement[name] for name in FIELDS if movement[name] is not None}
    entry["tanggal_transaksi"] = format_time(entry["tanggal_transaksi"])
    return entry


def log_context(movement: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a movement as logs and traces show them."""
    return {
        "id_transaksi": movement["id_transaksi"],
        "tanggal_transaksi": format_time(movement["tanggal_transaksi"]).replace("+00:00", "Z"),
        "no_rekening": mask(movement["no_rekening"]),
        "jenis_transaksi": movement["jenis_transaksi"],
        "nominal": movement["nominal"],
    }


def span(
    operation: Literal["send", "process"],
    movement: Mapping[str, Any],
    started_ns: int | None = None,
) -> AbstractContextManager[object]:
    """Open a span in the trace of a movement; without a trace there is no span.

    It began now, or at `started_ns`.
    https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
    """
    if movement["traceparent"] is None:
        return nullcontext()
    attributes = log_context(movement) | {
        "messaging.system": "redis",
        "messaging.destination.name": STREAM,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
    return tracer.start_as_current_span(
        f"{operation} {STREAM}",
        # In a Context of its own: it is no child of the current span.
        context=propagator.extract({"traceparent": movement["traceparent"]}, Context()),
        kind=SpanKind.PRODUCER if operation == "send" else SpanKind.CONSUMER,
        attributes=attributes,
        start_time=started_ns,
    )


def parse_error(error: ValueError) -> str:
    """Say which field is bad, without its value."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{problem['loc'][0]}: {problem['type']}"
    return type(error).__name__
