"""What is done with messages: store each movement once, move bad messages to the dead letters."""

import logging
import time
from contextlib import nullcontext

from redis import Redis
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from common.connections import data_refused, describe
from common.telemetry import masked, message_span
from mutasi import datastore
from mutasi.datastore import STREAM, Message

log = logging.getLogger(__name__)


def process(engine: Engine, redis: Redis, messages: list[Message]) -> None:
    """Store the good messages, then set the bad ones aside.

    In this order, since in a full Redis only the deletion of stored messages makes room for dead letters.
    """
    for message, reason in store(engine, redis, messages):
        datastore.set_aside(redis, message, reason)
        log.error("message moved to dead letters", extra={"entry": message[0].decode(), "reason": reason})


def store(engine: Engine, redis: Redis, messages: list[Message]) -> list[tuple[Message, str]]:
    """Store messages, then delete them from the stream. Returns the bad ones, each with the reason.

    After a crash in between the messages come again, and are in the book already. A bad message is one whose
    data the database refuses; it is found by halving. Any other error is raised: nothing is deleted.
    """
    started_ns = time.time_ns()
    try:
        movements = datastore.insert_mutations(engine, messages)
    except DBAPIError as error:
        if not data_refused(error):
            raise
        if len(messages) == 1:
            return [(messages[0], describe(error))]
        middle = len(messages) // 2
        return store(engine, redis, messages[:middle]) + store(engine, redis, messages[middle:])
    if len(messages) > len(movements):
        log.warning("duplicate messages ignored", extra={"count": len(messages) - len(movements)})
    for movement in movements:
        context = movement._asdict() | {"no_rekening": masked(movement.no_rekening)}
        parent = context.pop("traceparent")
        with message_span("process", STREAM, parent, context, started_ns) if parent else nullcontext():
            log.info("mutation stored", extra=context)
    datastore.delete_entries(redis, messages)
    log.debug("batch stored", extra={"count": len(messages)})
    return []
