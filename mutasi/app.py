"""What is done with a batch: store each movement once, move bad messages to the dead letters."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import data_refused, describe
from common.telemetry import masked, message_span
from mutasi import datastore
from mutasi.datastore import STREAM, Stream

log = logging.getLogger(__name__)


class Message(NamedTuple):
    """A stream entry: its id, and its fields as they came."""

    entry: bytes
    fields: dict[bytes, bytes]


def store(engine: Engine, stream: Stream, messages: Sequence[Message]) -> list[tuple[Message, str]]:
    """Store a batch, then delete it from the stream. Returns the bad messages, each with the reason.

    After a crash in between the messages come again, and are in the book already. Messages that the
    database refuses for their data are found by halving. Any other error is raised: nothing is deleted.
    """
    started_ns = time.time_ns()
    try:
        stored = datastore.insert_mutations(engine, [message.fields for message in messages])
    except DBAPIError as error:
        if not data_refused(error):
            raise
        if len(messages) == 1:
            return [(messages[0], f"refused by the database: {describe(error)}")]
        middle = len(messages) // 2
        return store(engine, stream, messages[:middle]) + store(engine, stream, messages[middle:])
    if len(messages) > len(stored):
        log.warning("duplicate messages ignored", extra={"count": len(messages) - len(stored)})
    for message in messages:
        if (id_transaksi := int(message.fields[b"id_transaksi"])) in stored:
            stored.remove(id_transaksi)  # the batch may have it twice
            _report(message, started_ns)
    stream.delete([message.entry for message in messages])
    duration_ms = (time.time_ns() - started_ns) // 1_000_000
    log.debug("batch stored", extra={"count": len(messages), "duration_ms": duration_ms})
    return []


def set_aside(stream: Stream, message: Message, reason: str) -> None:
    """Move a bad message to the dead letters."""
    stream.set_aside(*message, reason)
    log.error("message moved to dead letters", extra={"entry": message.entry.decode(), "reason": reason})


def _report(message: Message, started_ns: int) -> None:
    """Log a stored movement, in its request's trace if it has one."""
    fields = {name.decode(): value.decode() for name, value in message.fields.items()}
    context = {
        "id_transaksi": int(fields["id_transaksi"]),
        "no_rekening": masked(fields["no_rekening"]),
        "jenis_transaksi": fields["jenis_transaksi"],
        "nominal": int(fields["nominal"]),
    }
    parent = fields.get("traceparent")
    with message_span("process", STREAM, parent, context, started_ns) if parent else nullcontext():
        log.info("mutation stored", extra=context)
