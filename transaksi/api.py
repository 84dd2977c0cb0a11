"""The routes, and the form of their requests and answers."""

import asyncio
import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Security
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic
from pydantic import BaseModel, BeforeValidator, Field
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from common.telemetry import masked, traceparent
from transaksi import datastore
from transaksi.app import MAX_NOMINAL, MAX_SALDO, JenisTransaksi, Movement, Refusal

MAX_BODY = 4096
MAX_ID = 2**53 - 1  # above every id, and exact in JSON
KEY = "^[ -~]{1,255}$"
JSON = re.compile(r"application/([^;]+\+)?json\s*(;.*)?", re.IGNORECASE)


class MovementRequest(BaseModel, strict=True):
    """A deposit or a withdrawal of `nominal` whole rupiah."""

    no_rekening: str = Field(pattern="^[0-9]{10,16}$", examples=["1234567890"])
    nominal: int = Field(ge=1, le=MAX_NOMINAL, examples=[50000])


class Balance(BaseModel):
    """The balance in whole rupiah; after a movement, the balance right after it."""

    saldo: int = Field(ge=0, le=MAX_SALDO, examples=[1050000])


class BookedMovement(BaseModel, from_attributes=True):
    """A movement in the mutation book: whole rupiah, UTC."""

    id_transaksi: int = Field(examples=[17])
    tanggal_transaksi: datetime
    jenis_transaksi: JenisTransaksi
    nominal: int = Field(examples=[50000])
    saldo_akhir: int = Field(examples=[1050000])


class Statement(BaseModel):
    """A page of the mutation book, newest first. `sebelum` asks for the next page; null on the last."""

    mutasi: list[BookedMovement]
    sebelum: int | None


class Error(BaseModel):
    """Why a request was refused, in words for the customer."""

    remark: str = Field(examples=["Saldo tidak mencukupi."])


def digits(text: Any) -> Any:
    if isinstance(text, str) and not re.fullmatch("[0-9]{1,18}", text):  # int() takes " +1_0", too
        raise ValueError("not a whole number")
    return text


class PlainRoute(APIRoute):
    """Calls the endpoint with the request alone: FastAPI's own machinery costs 40 % of a request's CPU.

    https://fastapi.tiangolo.com/how-to/custom-request-and-route/
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = app


PIN = [Security(HTTPBasic(scheme_name="PIN", auto_error=False))]  # documents what `Gate` does
ERROR = {"model": Error}
ERRORS: Any = dict.fromkeys((400, 401, 408, 413, 415, 422, 503), ERROR)
movements = APIRouter(route_class=PlainRoute, dependencies=PIN, responses=ERRORS)
reads = APIRouter(dependencies=PIN, responses={401: ERROR, 503: ERROR})
health = APIRouter(responses={503: ERROR})
DOCUMENT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": MovementRequest.model_json_schema()}},
    },
    "parameters": [{"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "pattern": KEY}}],
}


@movements.post("/tarik", summary="Withdraw", response_model=Balance, openapi_extra=DOCUMENT)
@movements.post("/tabung", summary="Deposit", response_model=Balance, openapi_extra=DOCUMENT)
async def move(request: Request) -> Response:
    """The key of an accepted movement gets its answer again, with Idempotent-Replayed: true.

    503 with Retry-After: not carried out. Without: outcome unknown, repeat with the same key.
    """
    jenis_transaksi: JenisTransaksi = request.scope["path"][1:]  # "tabung" or "tarik"
    context = request.scope["context"]
    payload = MovementRequest.model_validate_json(await read_body(request))
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1 or not all(re.fullmatch(KEY, key) for key in keys):
        raise Refusal("Idempotency-Key")
    context |= {"jenis_transaksi": jenis_transaksi, "nominal": payload.nominal}
    if payload.no_rekening != request.scope["account"]:
        context["no_rekening_payload"] = masked(payload.no_rekening)
        raise Refusal("unknown_account")
    key = keys[0] if keys else None
    asked = Movement(jenis_transaksi, payload.no_rekening, payload.nominal, key, traceparent())
    made = await request.app.state.teller.submit(asked)
    replayed = made is not asked
    context |= {"saldo": made.saldo_akhir, "id_transaksi": made.id}
    request.scope["event"] = "movement replayed" if replayed else "movement accepted"
    headers = {"Idempotent-Replayed": "true"} if replayed else None
    return Response(b'{"saldo":%d}' % made.saldo_akhir, 200, headers, "application/json")


async def read_body(request: Request) -> bytes:
    """The payload. Raises `Refusal` if it is not JSON, too large, too late or cut off."""
    if not any(JSON.fullmatch(value) for value in request.headers.getlist("content-type")):
        raise Refusal("content_type")
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise Refusal("payload_large")
    except ClientDisconnect:
        raise Refusal("not_json") from None
    except asyncio.CancelledError:  # the time limit, or the server is stopping
        raise Refusal("payload_late") from None
    return body


@reads.get("/saldo", response_model=Balance)
async def saldo(request: Request) -> dict[str, int]:
    """The customer's balance."""
    return {"saldo": await request.app.state.reads.run(datastore.find_balance, request.scope["account"])}


# "4XX" keeps FastAPI from documenting a 422 of its own.
@reads.get("/mutasi", response_model=Statement, responses={400: ERROR, "4XX": ERROR})
async def mutasi(
    request: Request,
    sebelum: Annotated[int, Query(ge=1), BeforeValidator(digits)] = MAX_ID,
    batas: Annotated[int, Query(ge=1, le=100), BeforeValidator(digits)] = 20,
) -> dict[str, Any]:
    """The customer's booked movements, newest first: at most `batas`, with ids below `sebelum`."""
    account, more = request.scope["account"], batas + 1  # one more tells whether there is a next page
    rows = await request.app.state.reads.run(datastore.find_mutations, account, sebelum, more)
    page = rows[:batas]
    return {"mutasi": page, "sebelum": page[-1].id_transaksi if len(rows) > batas else None}


@health.get("/health")
async def ask_health(request: Request) -> dict[str, str]:
    """Whether PostgreSQL answers. Redis does not matter: movements wait for it in PostgreSQL."""
    state = request.app.state
    if not state.health or state.health.done():  # concurrent callers share one question
        state.health = state.reads.run(lambda engine: engine.connect().close())  # the pool pings
    done, _ = await asyncio.wait([state.health], timeout=2)
    if not done or state.health.exception():
        raise Refusal("unavailable", "PostgreSQL does not answer")
    return {"status": "ok"}


routes = movements.routes + reads.routes + health.routes
