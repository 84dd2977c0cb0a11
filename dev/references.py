"""The references of the benchmark: `python -m dev.references noop|plain -m transaksi OPTIONS`.

They replace the application of transaksi, and keep its command line and the settings of uvicorn and of the
garbage collector. The bound on request heads goes too: it is a cost of transaksi.
"""

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import sqlalchemy
from fastapi import FastAPI
from sqlalchemy import insert, select, update
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import transaksi.__main__ as product
from transaksi.api import Balance, MovementRequest
from transaksi.datastore import Rekening, Transaksi

engine = sqlalchemy.create_engine(os.environ["DB_URL"], pool_size=40)  # for each Starlette thread


async def noop(movement: MovementRequest) -> Balance:
    """The same payload and answer, nothing done."""
    return Balance(saldo=movement.nominal)


def plain(movement: MovementRequest) -> Balance:
    """A transaction of three statements; no authentication, idempotency key or mutation."""
    own, row = Rekening.no_rekening == movement.no_rekening, movement.model_dump()
    with engine.begin() as db:
        saldo = db.scalars(select(Rekening.saldo).where(own).with_for_update()).one()
        row |= {"jenis_transaksi": "tabung", "saldo_akhir": saldo + movement.nominal}
        db.execute(update(Rekening).where(own).values(saldo=row["saldo_akhir"]))
        db.execute(insert(Transaksi).values(row))
    return Balance(saldo=row["saldo_akhir"])


def create_app(endpoint: Callable[..., Any]) -> FastAPI:
    app = FastAPI()
    app.add_api_route("/tabung", endpoint, methods=["POST"])
    app.add_api_route("/health", lambda: "ok")
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    return app


if __name__ == "__main__":
    chosen = {"noop": noop, "plain": plain}[sys.argv[1]]
    del sys.argv[1:4]
    product.create_app = lambda: create_app(chosen)
    product.BoundedHttp = HttpToolsProtocol  # type: ignore[attr-defined, assignment]
    product.main()
