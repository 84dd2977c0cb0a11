"""How requests are refused: the remarks, the log line, the answer, and its place in the OpenAPI document."""

import logging
import time
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from transaksi.app import (
    Ditolak,
    KunciSudahDipakai,
    RekeningTidakDikenali,
    SaldoMelebihiBatas,
    SaldoTidakCukup,
    Unavailable,
    Unknown,
)

log = logging.getLogger(__name__)

CHALLENGE = {"WWW-Authenticate": 'Basic realm="transaksi", charset="UTF-8"'}  # RFC 7617
RETRY = {"Retry-After": "1"}

PIN_SALAH = "Nomor rekening atau PIN salah."
COBA_LAGI = "Layanan sedang tidak tersedia, silakan coba lagi."
BELUM_PASTI = (
    "Hasil transaksi belum dapat dipastikan; ulangi dengan Idempotency-Key yang sama, "
    "atau tanyakan dahulu bila tidak memakainya."
)
REMARKS = {
    400: "Payload bukan JSON yang sah.",
    404: "Alamat tidak dikenali.",
    405: "Metode tidak diizinkan untuk alamat ini.",
    408: "Payload tidak diterima lengkap pada waktunya.",
    413: "Payload melebihi 4 KiB.",
    415: "Content-Type harus application/json.",
    500: "Terjadi kesalahan pada layanan.",
}
FIELD_REMARKS = {
    "no_rekening": "no_rekening harus teks berisi 10 sampai 16 angka.",
    "nominal": "nominal harus bilangan bulat 1 sampai 1.000.000.000.000 rupiah.",
    "idempotency-key": "Idempotency-Key harus 1 sampai 255 karakter ASCII yang tercetak.",
}


class Kesalahan(BaseModel):
    """Why a request was refused, in words for the customer."""

    remark: str


def refuse(
    request: Request, status: int, remark: str, headers: dict[str, str] | None = None, **context: Any
) -> JSONResponse:
    """The one way in which a request is refused, to the client and to the log."""
    took = time.monotonic() - request.scope["arrived"]
    context |= {"status": status, "remark": remark, "duration_ms": round(took * 1000, 1)}
    log.warning("request refused", extra=request.scope["context"] | context)
    return JSONResponse({"remark": remark}, status, headers)


async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong with header or payload, as a remark that names the field."""
    fields = (part for problem in error.errors() for part in problem["loc"])
    return refuse(request, 400, next((FIELD_REMARKS[f] for f in fields if f in FIELD_REMARKS), REMARKS[400]))


async def on_http(request: Request, error: HTTPException) -> JSONResponse:
    return refuse(request, error.status_code, REMARKS[error.status_code], dict(error.headers or {}))


async def on_refused(request: Request, error: Ditolak) -> JSONResponse:
    return refuse(request, 422 if isinstance(error, KunciSudahDipakai) else 400, error.remark)


async def on_unavailable(request: Request, _: Unavailable) -> JSONResponse:
    return refuse(request, 503, COBA_LAGI, RETRY)


async def on_unknown(request: Request, _: Unknown) -> JSONResponse:
    return refuse(request, 503, BELUM_PASTI)


HANDLERS: dict[Any, Any] = {
    RequestValidationError: on_invalid,
    HTTPException: on_http,
    Ditolak: on_refused,
    Unavailable: on_unavailable,
    Unknown: on_unknown,
}


def answers(meaning: str, *remarks: str, **headers: str) -> dict[str, Any]:
    """The documentation of one refusal."""
    examples = {f"contoh{n}": {"value": {"remark": remark}} for n, remark in enumerate(remarks)}
    return {
        "model": Kesalahan,
        "description": meaning,
        "content": {"application/json": {"examples": examples}},
        "headers": {
            name.replace("_", "-"): {"schema": {"type": "string"}, "description": text}
            for name, text in headers.items()
        },
    }


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: answers(
        "Malformed, or against the rules; nothing has changed",
        RekeningTidakDikenali.remark,
        SaldoTidakCukup.remark,
        SaldoMelebihiBatas.remark,
        REMARKS[400],
        *FIELD_REMARKS.values(),
    ),
    401: answers("Not authenticated, whatever the cause", PIN_SALAH, WWW_Authenticate="RFC 7617"),
    408: answers("The payload did not come in time", REMARKS[408]),
    413: answers("The payload is over 4 KiB", REMARKS[413]),
    415: answers("The payload is not declared as JSON", REMARKS[415]),
    422: answers("The key was used for another path or payload", KunciSudahDipakai.remark),
    503: answers(
        "With Retry-After: not carried out, try again. Without: outcome unknown",
        COBA_LAGI,
        BELUM_PASTI,
        Retry_After="Seconds; only where nothing was carried out",
    ),
}
