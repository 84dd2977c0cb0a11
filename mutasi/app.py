"""Business logic: book each movement once, and tell bad messages from good ones."""

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from sqlalchemy import Engine, RowMapping
from sqlalchemy.exc import DBAPIError

from common.connections import is_data_error
from common.stream import STREAM, MutationRequest, parse_error
from common.telemetry import error_summary, log, message_span
from mutasi import datastore


@dataclass(frozen=True)
class Message:
    """A stream entry: its id, and its fields as they came."""

    entry: bytes
    fields: dict[bytes, bytes]


@dataclass(frozen=True)
class BadMessage:
    """A message that cannot be booked, and why."""

    message: Message
    reason: str


def store(engine: Engine, messages: Iterable[Message]) -> list[BadMessage]:
    """Book the movements of the good messages. Returns the bad ones.

    Raises DBAPIError if the database is unavailable; then the messages can be stored again.
    """
    good: list[tuple[Message, MutationRequest]] = []
    bad: list[BadMessage] = []
    for message in messages:
        try:
            good.append((message, MutationRequest.from_entry(message.fields)))
        except ValueError as error:
            bad.append(BadMessage(message, parse_error(error)))
    try:
        book(engine, [request for _, request in good])
    except DBAPIError as error:
        if not is_data_error(error):
            raise
        bad += book_one_by_one(engine, good)
    return bad


def book_one_by_one(
    engine: Engine, messages: Iterable[tuple[Message, MutationRequest]]
) -> Iterable[BadMessage]:
    """Book movements in a transaction each. Yields the messages that the database refuses."""
    for message, request in messages:
        try:
            book(engine, [request])
        except DBAPIError as error:
            if not is_data_error(error):
                raise
            yield BadMessage(message, error_summary(error))


def book(engine: Engine, requests: Sequence[MutationRequest]) -> None:
    """Book movements in one transaction, and log the new ones."""
    if not requests:
        return
    started_ns = time.time_ns()
    new = datastore.book(engine, requests)
    parents = {request.id_transaksi: request.traceparent for request in requests}
    for row in new:
        log_stored(row, parents[row["id_transaksi"]], started_ns)
    if duplicates := len(requests) - len(new):
        log.warning("duplicate messages ignored", count=duplicates)


def log_stored(row: RowMapping, parent: str | None, started_ns: int) -> None:
    """Log a booked movement as the database has it, and continue its trace."""
    context = MutationRequest.model_validate(dict(row)).log_context()
    with message_span("process", STREAM, parent, context, started_ns) if parent else nullcontext():
        log.info("mutation stored", **context)
