"""Business logic: book each movement once, and tell bad messages from good ones."""

import time
from collections.abc import Mapping

from sqlalchemy import Engine
from sqlalchemy.exc import DataError, IntegrityError

from common.stream import MutationRequest, log_context, parse_error, span
from common.telemetry import error_summary, log
from mutasi import datastore

Messages = dict[bytes, dict[bytes, bytes]]  # the fields of stream entries, by entry id


def book_messages(engine: Engine, messages: Messages) -> dict[bytes, str]:
    """Book the movements of the good messages.

    Returns the entry ids of the bad ones, each with the reason. Raises DBAPIError if the
    database is unavailable; then the messages can be booked again.
    """
    good: dict[bytes, MutationRequest] = {}
    bad: dict[bytes, str] = {}
    for entry_id, fields in messages.items():
        try:
            good[entry_id] = MutationRequest.from_entry(fields)
        except ValueError as error:
            bad[entry_id] = parse_error(error)
    return bad | book_good(engine, good)


def book_good(engine: Engine, good: Mapping[bytes, MutationRequest]) -> dict[bytes, str]:
    """Book movements in one transaction, and log the new ones.

    If PostgreSQL rejects the data, each is booked in its own transaction, so that only
    the bad ones fail. Returns those, each with the reason.
    """
    if not good:
        return {}
    started_ns = time.time_ns()
    try:
        new = datastore.book(engine, list(good.values()))
    except (DataError, IntegrityError) as error:
        if len(good) == 1:
            return dict.fromkeys(good, error_summary(error))
        bad: dict[bytes, str] = {}
        for entry_id, request in good.items():
            bad |= book_good(engine, {entry_id: request})
        return bad
    traceparents = {request.id_transaksi: request.traceparent for request in good.values()}
    for row in new:
        # The row, not the request: another message of the same id may be forged.
        movement = {**row, "traceparent": traceparents[row["id_transaksi"]]}
        with span("process", movement, started_ns):
            log.info("mutation stored", **log_context(movement))
    if duplicates := len(good) - len(new):
        log.warning("duplicate messages ignored", count=duplicates)
    return {}
