"""The tables of service mutasi and its statements. init.sql makes the schema."""

from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar

from sqlalchemy import (
    Engine,
    RowMapping,
    delete,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from common.connections import COLUMN_TYPES
from common.stream import JenisTransaksi, MutationRequest


class Base(DeclarativeBase):
    """The tables that service mutasi uses."""

    type_annotation_map: ClassVar = COLUMN_TYPES


class Mutasi(Base):
    """A booked movement."""

    __tablename__ = "mutasi"

    id_transaksi: Mapped[int] = mapped_column(primary_key=True)
    no_rekening: Mapped[str]
    tanggal_transaksi: Mapped[datetime]
    jenis_transaksi: Mapped[JenisTransaksi]
    nominal: Mapped[int]


class Outbox(Base):
    """A movement that is not booked yet."""

    __tablename__ = "outbox"

    id_transaksi: Mapped[int] = mapped_column(primary_key=True)


INSERT_ONCE = (
    insert(Mutasi).on_conflict_do_nothing(index_elements=[Mutasi.id_transaksi]).returning(Mutasi)
)


def book(engine: Engine, requests: Sequence[MutationRequest]) -> Sequence[RowMapping]:
    """Book movements and delete them from the outbox, in one transaction.

    Returns the rows of those that were not booked before. Two consumers with the same
    requests cannot deadlock, because they insert in the order of the ids. Raises
    IntegrityError if a request differs from the journal.
    """
    ordered = sorted(requests, key=lambda request: request.id_transaksi)
    rows = [request.model_dump(exclude={"traceparent"}) for request in ordered]
    ids = [request.id_transaksi for request in ordered]
    with engine.begin() as connection:
        new = connection.execute(INSERT_ONCE, rows).mappings().all()
        connection.execute(delete(Outbox).where(Outbox.id_transaksi.in_(ids)))
    return new


def ping(engine: Engine) -> None:
    """Raise DBAPIError if PostgreSQL cannot be reached."""
    with engine.connect() as connection:
        connection.execute(select(1))
