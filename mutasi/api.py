"""The incoming edge: the plain blocking XREAD loop, and the form of a message."""

import logging
import re
from pathlib import Path
from threading import Event

from sqlalchemy import Engine

from mutasi.app import store
from mutasi.datastore import Stream

log = logging.getLogger(__name__)

FORM = {
    b"id_transaksi": rb"\d{1,18}",
    b"tanggal_transaksi": rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)",  # RFC 3339
    b"no_rekening": rb"\d{10,16}",
    b"jenis_transaksi": b"tabung|tarik",
    b"nominal": rb"\d{1,13}",
    b"traceparent": b"[0-9a-f-]{0,100}",  # only of a traced movement
}


def flaw(fields: dict[bytes, bytes]) -> str | None:
    """What is wrong with the form of a message; None if nothing is."""
    if unknown := fields.keys() - FORM.keys():
        return f"{len(unknown)} unknown field(s)"
    for name, form in FORM.items():
        if not re.fullmatch(form, fields.get(name, b"")):
            return f"{name.decode()} is missing or not valid"
    return None


def consume(engine: Engine, stream: Stream, batch_size: int, stopping: Event, alive: Path) -> None:
    """Store what the stream brings until `stopping`; touches `alive` each turn, for the health check.

    Retries with a growing pause, for example while a server is away: the entries stay in the stream.
    """
    pause_s = 0.0
    while not stopping.wait(pause_s):
        try:
            alive.touch()
            process_batch(engine, stream, batch_size)
            pause_s = 0.0
        except Exception:
            log.exception("processing failed")
            pause_s = min(pause_s + 0.25, 5.0)


def process_batch(engine: Engine, stream: Stream, batch_size: int) -> None:
    """Read a batch, store its good messages, then set the bad ones aside.

    In this order, since in a full Redis only the deletion of stored messages makes room for dead letters.
    """
    read = [(message, flaw(message.fields)) for message in stream.read(batch_size)]
    bad = [(message, reason) for message, reason in read if reason]
    bad += store(engine, stream, [message for message, reason in read if not reason])
    for message, reason in bad:
        stream.set_aside(message, reason)
        log.error("message moved to dead letters", extra={"entry": message.entry.decode(), "reason": reason})
