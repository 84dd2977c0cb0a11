"""HTTP: the routes with their request and response models, and the answers to errors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBasic
from pydantic import BaseModel, Field
from starlette.authentication import SimpleUser
from starlette.exceptions import HTTPException
from structlog.contextvars import bind_contextvars

from common.stream import MAX_NOMINAL, WHOLE_NUMBER, JenisTransaksi, NoRekening
from common.telemetry import current_traceparent, mask
from transaksi import app
from transaksi.app import MAX_SALDO, Bank, BankError, Movement

# Without a format, generated clients use integers of 32 bits.
Int64 = Annotated[int, Field(json_schema_extra={"format": "int64"})]


class MovementRequest(BaseModel, strict=True):
    """A deposit or a withdrawal of `nominal` whole rupiah."""

    no_rekening: NoRekening = Field(examples=["1234567890"])
    nominal: Int64 = Field(ge=1, le=MAX_NOMINAL, examples=[50000])


class Balance(BaseModel):
    """The balance in whole rupiah; after a movement, the balance right after it."""

    saldo: Int64 = Field(ge=0, le=MAX_SALDO, examples=[1050000])


class BookedMovement(BaseModel):
    """A booked movement: whole rupiah, UTC."""

    id_transaksi: Int64 = Field(examples=[17])
    tanggal_transaksi: datetime
    jenis_transaksi: JenisTransaksi
    nominal: Int64 = Field(examples=[50000])
    saldo_akhir: Int64 = Field(examples=[1050000])


class Statement(BaseModel):
    """Booked movements, newest first. `sebelum` asks for the next page; null on the last."""

    mutasi: list[BookedMovement]
    sebelum: Int64 | None


class Health(BaseModel):
    """PostgreSQL takes writes."""

    status: str = Field(examples=["ok"])


class Error(BaseModel):
    """Why a request was refused, in words for the customer."""

    remark: str = Field(examples=["Saldo tidak mencukupi."])


# ---------------------------------------------------------------- errors


@dataclass(frozen=True)
class ErrorAnswer:
    """The status, remark and headers that answer an error."""

    status: int
    remark: str
    headers: Mapping[str, str] | None = None


class MalformedKey(Exception):
    """The Idempotency-Key is not one printable ASCII text."""


CHALLENGE = {"WWW-Authenticate": 'Basic realm="transaksi", charset="UTF-8"'}  # RFC 7617

ANSWERS: dict[type, ErrorAnswer] = {
    Exception: ErrorAnswer(500, "Terjadi kesalahan pada layanan."),
    app.Refused: ErrorAnswer(400, "Transaksi ditolak."),
    app.UnknownAccount: ErrorAnswer(400, "Nomor rekening tidak dikenali."),
    app.InsufficientBalance: ErrorAnswer(400, "Saldo tidak mencukupi."),
    app.BalanceLimit: ErrorAnswer(400, "Saldo akan melebihi batas."),
    app.NotAuthenticated: ErrorAnswer(401, "Nomor rekening atau PIN salah.", CHALLENGE),
    app.KeyReused: ErrorAnswer(422, "Idempotency-Key sudah dipakai untuk transaksi lain."),
    app.NotExecuted: ErrorAnswer(
        503,
        "Layanan sedang tidak tersedia, silakan coba lagi.",
        {"Retry-After": "1"},
    ),
    app.OutcomeUnknown: ErrorAnswer(
        503,
        "Hasil belum pasti: ulangi dengan Idempotency-Key yang sama. "
        "Tanpa Idempotency-Key, cek saldo beberapa saat lagi.",
    ),
    MalformedKey: ErrorAnswer(
        400, "Idempotency-Key harus 1 sampai 255 karakter ASCII yang tercetak."
    ),
}
FRAMEWORK_REMARKS = {
    400: "Payload bukan JSON yang sah.",
    404: "Alamat tidak dikenali.",
    405: "Metode tidak diizinkan untuk alamat ini.",
    413: "Payload melebihi 4 KiB.",
}
FIELD_REMARKS = {
    "no_rekening": "no_rekening harus teks berisi 10 sampai 16 angka.",
    "nominal": "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah.",
    "sebelum": "sebelum harus bilangan bulat positif, paling banyak 19 angka.",
    "batas": "batas harus bilangan bulat 1 sampai 100.",
}


def error_response(error: Exception) -> JSONResponse:
    """Return the answer to any error, and bind it to the log line of the request."""
    answer = find_answer(error)
    # The texts of FastAPI's errors may quote the payload.
    reason = str(error) if isinstance(error, BankError) else type(error).__name__
    bind_contextvars(remark=answer.remark, reason=reason)
    return JSONResponse({"remark": answer.remark}, answer.status, answer.headers)


def find_answer(error: Exception) -> ErrorAnswer:
    if isinstance(error, RequestValidationError):
        fields = [problem["loc"][-1] for problem in error.errors()]
        remarks = [FIELD_REMARKS[field] for field in fields if field in FIELD_REMARKS]
        return ErrorAnswer(400, remarks[0] if remarks else FRAMEWORK_REMARKS[400])
    if isinstance(error, HTTPException):
        remark = FRAMEWORK_REMARKS.get(error.status_code, ANSWERS[Exception].remark)
        return ErrorAnswer(error.status_code, remark, error.headers)
    # An error that is not listed is answered like its base class.
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


async def handle_error(_: Request, error: Exception) -> JSONResponse:
    return error_response(error)


HANDLERS: dict[Any, Any] = dict.fromkeys(
    (BankError, MalformedKey, RequestValidationError, HTTPException),
    handle_error,
)


# ---------------------------------------------------------------- what a request carries

KEY_PATTERN = "^[ -~]{1,255}$"


def bank(request: Request) -> Bank:
    """Return the bank of this process."""
    found: Bank = request.app.state.bank
    return found


def customer(request: Request) -> str:
    """Return the account that the middleware has authenticated."""
    user: SimpleUser = request.user
    return user.username


def idempotency_key(request: Request) -> str | None:
    """Return the Idempotency-Key header. Raises MalformedKey."""
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1 or not all(re.fullmatch(KEY_PATTERN, key) for key in keys):
        raise MalformedKey
    return keys[0] if keys else None


KEY_PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A repeated key returns the original response.",
    "schema": {"type": "string", "pattern": KEY_PATTERN},
}


# ---------------------------------------------------------------- routes

ERROR: dict[str, Any] = {"model": Error}
READ_ERRORS: Any = dict.fromkeys((401, 503), ERROR)
MOVEMENT: Any = {
    "response_model": Balance,
    "responses": dict.fromkeys((400, 401, 413, 422, 503), ERROR),
    "openapi_extra": {"parameters": [KEY_PARAMETER], "security": [{"PIN": []}]},
}
# Does nothing at run time: it documents what the middleware does. The POST routes name the
# scheme in `openapi_extra` instead, because a dependency would cost a tenth of a deposit.
authenticated = Security(HTTPBasic(scheme_name="PIN", auto_error=False))

router = APIRouter()
OPEN_PATHS = {
    "/health",
    "/docs",
    "/openapi.json",
    "/static-offline-docs/swagger-ui-bundle.js",
    "/static-offline-docs/swagger-ui.css",
    "/static-offline-docs/favicon.png",
}


@router.post("/tabung", **MOVEMENT)
async def deposit(movement: MovementRequest, request: Request) -> Response:
    """Deposit. Repeating a key returns the original response.

    503 with Retry-After: this attempt moved nothing. Without: outcome unknown, repeat the key.
    """
    return await move("tabung", movement, request)


@router.post("/tarik", **MOVEMENT)
async def withdraw(movement: MovementRequest, request: Request) -> Response:
    """Withdraw. Repeating a key returns the original response.

    503 with Retry-After: this attempt moved nothing. Without: outcome unknown, repeat the key.
    """
    return await move("tarik", movement, request)


async def move(
    jenis_transaksi: JenisTransaksi, payload: MovementRequest, request: Request
) -> Response:
    bind_contextvars(jenis_transaksi=jenis_transaksi, nominal=payload.nominal)
    if payload.no_rekening != customer(request):
        bind_contextvars(no_rekening_payload=mask(payload.no_rekening))  # refused later
    movement = Movement(
        jenis_transaksi,
        payload.no_rekening,
        payload.nominal,
        idempotency_key(request),
        current_traceparent(),
    )
    receipt = await bank(request).move(customer(request), movement)
    outcome = "replayed" if receipt.replayed else "accepted"
    bind_contextvars(outcome=outcome, id_transaksi=receipt.id_transaksi, saldo=receipt.saldo)
    headers = {"Idempotent-Replayed": "true"} if receipt.replayed else None
    answer = Balance(saldo=receipt.saldo).model_dump_json()
    return Response(answer, headers=headers, media_type="application/json")


@router.get("/saldo", responses=READ_ERRORS, dependencies=[authenticated])
async def balance(request: Request) -> Balance:
    """Return the customer's balance."""
    return Balance(saldo=await bank(request).balance(customer(request)))


# FastAPI documents a 422 of its own, unless "4XX" is documented.
@router.get(
    "/mutasi",
    responses=READ_ERRORS | {400: ERROR, "4XX": ERROR},
    dependencies=[authenticated],
)
async def statement(
    request: Request,
    sebelum: Annotated[Int64 | None, Query(ge=1, le=2**63 - 1), WHOLE_NUMBER] = None,
    batas: Annotated[Int64, Query(ge=1, le=100), WHOLE_NUMBER] = 20,
) -> Statement:
    """Return the customer's booked movements, newest first.

    At most `batas`; with `sebelum`, only those with lower ids.
    """
    page = await bank(request).statement(customer(request), sebelum, batas)
    movements = [BookedMovement.model_validate(row) for row in page.movements]
    return Statement(mutasi=movements, sebelum=page.before)


@router.get("/health", responses={503: ERROR})
async def health(request: Request) -> Health:
    """Tell whether PostgreSQL takes writes. Redis does not matter: the outbox has its movements."""
    await bank(request).ping()
    return Health(status="ok")
