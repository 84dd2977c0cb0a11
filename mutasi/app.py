"""What is done with a batch: store each movement once, move bad messages to the dead letters."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import data_refused, describe
from common.telemetry import masked, message_span
from mutasi import datastore
from mutasi.datastore import STREAM, Facts, Stream

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """A stream entry: its id, its fields as they came, and as text ({} if malformed)."""

    entry: bytes
    fields: dict[bytes, bytes]
    row: dict[str, str]

    @property
    def facts(self) -> Facts:
        row = self.row
        return int(row["id_transaksi"]), row["no_rekening"], row["jenis_transaksi"], int(row["nominal"])


def store(engine: Engine, stream: Stream, messages: Sequence[Message]) -> list[tuple[Message, str]]:
    """Store a batch, then delete it from the stream. Returns the bad messages, each with the reason.

    After a crash in between the messages come again, and are in the book already. Messages that the
    database refuses for their data are found by halving. Any other error is raised: nothing is deleted.
    """
    started_ns = time.time_ns()
    try:
        stored = datastore.insert_mutations(engine, [message.row for message in messages])
    except DBAPIError as error:
        if not data_refused(error):
            raise
        if len(messages) > 1:
            middle = len(messages) // 2
            return store(engine, stream, messages[:middle]) + store(engine, stream, messages[middle:])
        facts = describe(error)
        return [
            (messages[0], f"refused by the database: {facts['error']} {facts['constraint'] or ''}".strip())
        ]
    repeated = []
    for message in messages:
        if message.facts in stored:
            stored.discard(message.facts)
            _report(message, started_ns)
        else:
            repeated.append(message)
    known = datastore.find_mutations(engine, [m.row for m in repeated]) if repeated else set()
    differing = [message for message in repeated if message.facts not in known]
    if len(repeated) > len(differing):
        log.warning("duplicate messages ignored", extra={"count": len(repeated) - len(differing)})
    stream.delete([message.entry for message in messages if message not in differing])
    duration_ms = (time.time_ns() - started_ns) // 1_000_000
    log.debug("batch stored", extra={"count": len(messages) - len(repeated), "duration_ms": duration_ms})
    return [(message, "differs from the mutation book") for message in differing]


def set_aside(stream: Stream, message: Message, reason: str) -> None:
    """Move a bad message to the dead letters."""
    stream.set_aside(message.entry, message.fields, reason)
    log.error("message moved to dead letters", extra={"entry": message.entry.decode(), "reason": reason})


def _report(message: Message, started_ns: int) -> None:
    """Log a stored movement, in its request's trace if it has one."""
    context = dict(
        zip(("id_transaksi", "no_rekening", "jenis_transaksi", "nominal"), message.facts, strict=True)
    )
    context["no_rekening"] = masked(message.row["no_rekening"])
    parent = message.row.get("traceparent")
    with message_span("process", STREAM, parent, context, started_ns) if parent else nullcontext():
        log.info("mutation stored", extra=context)
