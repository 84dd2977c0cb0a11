"""What the benchmark compares transaksi with: `python -m dev.references noop|plain OPTIONS PORT`.

Both have its models, its settings of uvicorn and of the garbage collector, and ignore its options.
"""

import gc
import os
import sys
from typing import Any

import sqlalchemy
import uvicorn
from fastapi import FastAPI
from sqlalchemy import insert, select, update

from transaksi.api import Balance, MovementRequest
from transaksi.datastore import Rekening, Transaksi

engine = sqlalchemy.create_engine(os.environ["DB_URL"], pool_size=40)  # for each Starlette thread


async def noop(movement: MovementRequest) -> Balance:
    """Answer with a balance of the same form, and do nothing."""
    return Balance(saldo=movement.nominal)


def plain(movement: MovementRequest) -> Balance:
    """Deposit the plain way: a transaction of three statements, and nothing else."""
    own = Rekening.no_rekening == movement.no_rekening
    with engine.begin() as connection:
        before = connection.scalars(select(Rekening.saldo).where(own).with_for_update()).one()
        saldo = before + movement.nominal
        connection.execute(update(Rekening).where(own).values(saldo=saldo))
        row = movement.model_dump() | {"jenis_transaksi": "tabung", "saldo_akhir": saldo}
        connection.execute(insert(Transaksi).values(row))
    return Balance(saldo=saldo)


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[-1])
    app = FastAPI()
    app.post("/tabung")({"noop": noop, "plain": plain}[name])
    app.get("/health")(lambda: "ok")
    settings: Any = {"ws": "none", "log_config": None, "access_log": False, "server_header": False}
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    uvicorn.run(app, port=port, proxy_headers=False, timeout_keep_alive=75, **settings)


if __name__ == "__main__":
    main()
