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

FIELDS = {
    b"id_transaksi": re.compile(rb"[0-9]{1,18}"),
    b"tanggal_transaksi": re.compile(  # RFC 3339, with its offset
        rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})"
    ),
    b"no_rekening": re.compile(rb"[0-9]{10,16}"),
    b"jenis_transaksi": re.compile(rb"tabung|tarik"),
    b"nominal": re.compile(rb"[0-9]{1,13}"),
}
OPTIONAL = {b"traceparent": re.compile(rb"[0-9a-f-]{1,100}")}


class Invalid(ValueError):
    """Why a message is not well-formed."""


def parse(fields: dict[bytes, bytes]) -> dict[str, str]:
    """The fields of a message as text. Raises `Invalid` where they are not of the form."""
    for name, form in (FIELDS | OPTIONAL).items():
        value = fields.get(name)
        if value is None and name in FIELDS:
            raise Invalid(f"{name.decode()} is missing")
        if value is not None and not form.fullmatch(value):
            raise Invalid(f"{name.decode()} is not valid")
    if unknown := fields.keys() - FIELDS.keys() - OPTIONAL.keys():
        raise Invalid(f"{len(unknown)} unknown field(s)")
    return {name.decode(): value.decode() for name, value in fields.items()}


def consume(engine: Engine, stream: Stream, batch_size: int, stopping: Event, alive: Path) -> None:
    """Store what the stream brings until `stopping`; touches `alive` each turn, for the health check.

    While a server is away it retries with a growing pause: the entries stay in the stream.
    """
    outage = Outage("PostgreSQL or Redis")
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
        except Invalid as reason:
            bad.append((entry, fields, str(reason)))
    if good:
        store(engine, stream, good)
    for message in bad:
        set_aside(stream, *message)
