"""Store each movement once, and tell the bad messages from the good ones."""

import logging
import time
from contextlib import nullcontext

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import data_refused, describe
from common.telemetry import masked, message_span
from mutasi import datastore
from mutasi.datastore import STREAM, Message, Stream

log = logging.getLogger(__name__)


def store(engine: Engine, stream: Stream, messages: list[Message]) -> list[tuple[Message, str]]:
    """Store messages, then delete them from the stream. Returns the bad ones, each with the reason.

    After a crash in between the messages come again, and are in the book already. Messages that the
    database refuses for their data are found by halving. Any other error is raised: nothing is deleted.
    """
    if not messages:
        return []
    started_ns = time.time_ns()
    try:
        stored = datastore.insert_mutations(engine, messages)
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
    stream.delete(messages)
    log.debug("batch stored", extra={"count": len(messages)})
    return []


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
