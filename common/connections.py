"""Connections to PostgreSQL and Redis, and the types of columns."""

import os
import select
from datetime import datetime
from typing import Any, get_args

from redis import Redis
from sqlalchemy import URL, BigInteger, DateTime, Engine, create_engine, event
from sqlalchemy.dialects.postgresql import ENUM
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError

from common.config import Settings
from common.stream import JenisTransaksi

# How the columns of init.sql appear in mapped classes.
COLUMN_TYPES = {
    int: BigInteger(),
    datetime: DateTime(timezone=True),
    JenisTransaksi: ENUM(*get_args(JenisTransaksi), name="jenis_transaksi"),
}

# SQLSTATEs of a server that takes no writes, that is stopping, has crashed, or is starting.
# Its connections still work.
WRONG_SERVER = {"25006", "57P01", "57P02", "57P03"}


def open_engine(settings: Settings) -> Engine:
    """Make an engine that drops connections to servers that cannot serve us.

    Of several hosts, the one that takes writes is used. The TCP timeouts detect a host
    that is silent: https://www.postgresql.org/docs/18/libpq-connect.html
    """
    url = URL.create(
        "postgresql+psycopg2",
        username=os.environ["DB_USER"],
        password=os.environ["DB_PASSWORD"],
        host=settings.db_host,
        port=settings.db_port,
        database=settings.db_name,
    )
    connect_args = {
        "target_session_attrs": "read-write",
        "connect_timeout": 2,
        "tcp_user_timeout": 5000,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
    }
    engine = create_engine(
        url,
        connect_args=connect_args,
        hide_parameters=True,
        pool_size=0,  # no limit: the threads that use it are the limit
    )
    event.listen(engine, "checkout", drop_closed)
    event.listen(engine, "handle_error", drop_wrong_server)
    return engine


def drop_closed(connection: Any, *_: object) -> None:
    """Have the pool replace a connection that the server has closed.

    Nothing else makes an idle connection readable. Unlike `pool_pre_ping`, this costs no
    round trip, but it does not see that a host has just vanished: then one call fails.
    https://docs.sqlalchemy.org/en/21/core/events.html: PoolEvents.checkout
    """
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if poll.poll(0):
        raise DisconnectionError


def drop_wrong_server(context: ExceptionContext) -> None:
    """Have SQLAlchemy drop all pooled connections to a server that cannot serve us."""
    if getattr(context.original_exception, "pgcode", None) in WRONG_SERVER:
        context.is_disconnect = True


def open_redis(settings: Settings) -> Redis:
    """Make a client that gives up after 2 s and does not retry."""
    return Redis(
        settings.redis_host,
        settings.redis_port,
        password=os.environ.get("REDIS_PASSWORD"),
        socket_timeout=2,
        socket_connect_timeout=2,
        retry=None,  # type: ignore[arg-type]
    )
