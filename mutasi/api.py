"""The incoming edge: the plain blocking XREAD loop, and what a valid message is."""

import logging
import re
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import get_args

from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from mutasi.app import set_aside, store
from mutasi.datastore import Entry, Jenis, Pesan, Stream
from servers import Outage

log = logging.getLogger(__name__)

FIELDS = {
    b"id_transaksi": re.compile(rb"[0-9]{1,18}"),
    b"tanggal_transaksi": re.compile(  # RFC 3339, with its offset
        rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)"
    ),
    b"no_rekening": re.compile(rb"[0-9]{10,16}"),
    b"jenis_transaksi": re.compile("|".join(get_args(Jenis)).encode()),
    b"nominal": re.compile(rb"[0-9]{1,13}"),
}
OPTIONAL = {b"traceparent": re.compile(rb"[0-9a-f-]{1,100}")}


class Invalid(ValueError):
    """Why a message is not valid."""


def parse(entry: Entry) -> Pesan:
    """The message of an entry; raises `Invalid` where it is none."""
    for name, form in (FIELDS | OPTIONAL).items():
        value = entry.fields.get(name)
        if value is None and name in FIELDS:
            raise Invalid(f"{name.decode()} is missing")
        if value is not None and not form.fullmatch(value):
            raise Invalid(f"{name.decode()} is not valid")
    if unknown := len(entry.fields.keys() - FIELDS.keys() - OPTIONAL.keys()):
        raise Invalid(f"{unknown} unknown field(s)")
    text = {name.decode(): value.decode() for name, value in entry.fields.items()}
    try:
        moment = datetime.fromisoformat(text["tanggal_transaksi"])
    except ValueError:
        raise Invalid("tanggal_transaksi is not a date") from None
    return Pesan(
        entry,
        int(text["id_transaksi"]),
        moment,
        text["no_rekening"],
        text["jenis_transaksi"],
        int(text["nominal"]),
        text.get("traceparent"),
    )


def consume(engine: Engine, stream: Stream, batch_size: int, stopping: Event, alive: Path) -> None:
    """Store what the stream brings, until told to stop; touches `alive` each turn, for the health check.

    A server that is away is waited for, with a growing pause: the entries stay in the stream.
    """
    outage = Outage(log, "PostgreSQL or Redis")
    pause = 0.0
    while not stopping.is_set():
        alive.touch()
        try:
            turn(engine, stream, batch_size)
            outage.end()
            pause = 0.0
        except (DBAPIError, RedisError) as error:
            outage.begin(error)
            pause = min(pause + 0.25, 5.0)
            stopping.wait(pause)


def turn(engine: Engine, stream: Stream, batch_size: int) -> None:
    """One batch: good ones into the book, then bad ones aside.

    In this order, because a Redis that is full takes no dead letters, and what is stored makes room in it.
    """
    good: list[Pesan] = []
    bad: list[tuple[Entry, Invalid]] = []
    for entry in stream.read(batch_size):
        try:
            good.append(parse(entry))
        except Invalid as reason:
            bad.append((entry, reason))
    if good:
        store(engine, stream, good)
    for entry, cause in bad:
        set_aside(stream, entry, str(cause))
