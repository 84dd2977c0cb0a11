"""The incoming edge: the plain blocking XREAD loop, and the form of a message."""

import logging
import re
from pathlib import Path
from threading import Event

from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import Outage
from mutasi.app import Message, set_aside, store
from mutasi.datastore import Stream

log = logging.getLogger(__name__)

DATE, TIME, OFFSET = rb"\d{4}-\d\d-\d\d", rb"\d\d:\d\d:\d\d(\.\d{1,6})?", rb"(Z|[+-]\d\d:\d\d)"
FIELDS = {
    b"id_transaksi": rb"\d{1,18}",
    b"tanggal_transaksi": DATE + rb"T" + TIME + OFFSET,  # RFC 3339
    b"no_rekening": rb"\d{10,16}",
    b"jenis_transaksi": rb"tabung|tarik",
    b"nominal": rb"\d{1,13}",
    b"traceparent": rb"[0-9a-f-]{1,100}",
}
OPTIONAL = {b"traceparent"}


class Invalid(ValueError):
    """Why a message is not well-formed."""


def parse(fields: dict[bytes, bytes]) -> dict[str, str]:
    """The fields of a message as text. Raises `Invalid` if one is missing, malformed or unknown."""
    if missing := FIELDS.keys() - OPTIONAL - fields.keys():
        raise Invalid(f"{min(missing).decode()} is missing")
    if unknown := fields.keys() - FIELDS.keys():
        raise Invalid(f"{len(unknown)} unknown field(s)")
    for name, value in fields.items():
        if not re.fullmatch(FIELDS[name], value):
            raise Invalid(f"{name.decode()} is not valid")
    return {name.decode(): value.decode() for name, value in fields.items()}


def consume(engine: Engine, stream: Stream, batch_size: int, stopping: Event, alive: Path) -> None:
    """Store what the stream brings until `stopping`; touches `alive` each turn, for the health check.

    While a server is away it retries with a growing pause: the entries stay in the stream.
    """
    outage = Outage(log, "PostgreSQL or Redis")
    pause_s = 0.0
    while not stopping.is_set():
        alive.touch()
        try:
            process_batch(engine, stream, batch_size)
            outage.end()
            pause_s = 0.0
        except (DBAPIError, RedisError) as error:
            outage.begin(error)
            pause_s = min(pause_s + 0.25, 5.0)
            stopping.wait(pause_s)


def process_batch(engine: Engine, stream: Stream, batch_size: int) -> None:
    """Read a batch, store its good messages, then set the bad ones aside.

    In this order: a Redis that is full takes no dead letters until stored messages are deleted.
    """
    good, bad = [], []
    for entry, fields in stream.read(batch_size):
        try:
            good.append(Message(entry, fields, parse(fields)))
        except Invalid as error:
            bad.append((Message(entry, fields, {}), str(error)))
    if good:
        bad += store(engine, stream, good)
    for message, reason in bad:
        set_aside(stream, message, reason)
