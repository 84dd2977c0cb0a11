"""What the benchmark compares transaksi with: POST /noop and POST /plain, tuned as it is."""

import gc
import os
import sys

import sqlalchemy
import uvicorn
from fastapi import FastAPI
from sqlalchemy import insert, select, update

from transaksi.api import Balance, MovementRequest
from transaksi.datastore import Rekening, Transaksi

app = FastAPI()
app.get("/health")(lambda: "ok")
engine = sqlalchemy.create_engine(os.environ["DB_URL"], pool_size=40)  # for each Starlette thread


@app.post("/noop")
async def noop(movement: MovementRequest) -> Balance:
    """Answer with a balance of the same form, and do nothing."""
    return Balance(saldo=movement.nominal)


@app.post("/plain")
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


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    port = int(sys.argv[-1])  # the other options are transaksi's
    uvicorn.run(app, port=port, access_log=False, server_header=False, proxy_headers=False)
