"""Business logic: book each movement once, and tell bad messages from good ones."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import Engine, RowMapping
from sqlalchemy.exc import DBAPIError

from common.connections import is_data_error
from common.stream import MutationRequest, log_context, parse_error, span
from common.telemetry import error_summary, log
from mutasi import datastore


@dataclass(frozen=True, eq=False)
class Message:
    """A stream entry: its id, and its fields as they came."""

    entry_id: bytes
    fields: dict[bytes, bytes]


def book_messages(engine: Engine, messages: Iterable[Message]) -> dict[Message, str]:
    """Book the movements of the good messages. Returns the bad ones, each with the reason.

    Raises DBAPIError if the database is unavailable; then the messages can be booked again.
    """
    good: dict[Message, MutationRequest] = {}
    bad: dict[Message, str] = {}
    for message in messages:
        try:
            good[message] = MutationRequest.from_entry(message.fields)
        except ValueError as error:
            bad[message] = parse_error(error)
    return bad | book_good(engine, good)


def book_good(engine: Engine, good: Mapping[Message, MutationRequest]) -> dict[Message, str]:
    """Book movements in one transaction, and log the new ones.

    If PostgreSQL does not take the data, each is booked in its own transaction, so that only
    the bad ones fail. Returns those, each with the reason.
    """
    if not good:
        return {}
    started_ns = time.time_ns()
    try:
        new = datastore.book(engine, list(good.values()))
    except DBAPIError as error:
        if not is_data_error(error):
            raise
        if len(good) == 1:
            return dict.fromkeys(good, error_summary(error))
        bad: dict[Message, str] = {}
        for message, request in good.items():
            bad |= book_good(engine, {message: request})
        return bad
    parents = {request.id_transaksi: request.traceparent for request in good.values()}
    for row in new:
        log_stored(row, parents[row["id_transaksi"]], started_ns)
    if duplicates := len(good) - len(new):
        log.warning("duplicate messages ignored", count=duplicates)
    return {}


def log_stored(row: RowMapping, parent: str | None, started_ns: int) -> None:
    """Log a booked movement as the database has it, and continue its trace."""
    movement = {**row, "traceparent": parent}
    with span("process", movement, started_ns):
        log.info("mutation stored", **log_context(movement))
