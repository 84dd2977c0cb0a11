"""The HTTP edge: authentication before routing, the routes, and the answers to refused requests."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Security
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic
from opentelemetry import trace
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from common.connections import describe
from common.telemetry import masked, traceparent
from transaksi import datastore, payloads
from transaksi.app import Command, JenisTransaksi, Refusal, Replay
from transaksi.payloads import documented, validate
from transaksi.pin import PinCheck, parse

log = logging.getLogger(__name__)

MAX_BODY = 4096
# No refusal of credentials comes earlier: its time must not tell its cause. 0.3 s, and the timer's precision.
MIN_401_S = 0.302
JSON = re.compile(rb"application/([^;]+\+)?json\s*(;.*)?", re.IGNORECASE)
SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
OPEN_PATHS = {"/health", "/docs", "/openapi.json", *(f"/static-offline-docs/{name}" for name in SWAGGER)}


class Gate:
    """Middleware: authenticates every request, ends it at the time limit, and answers refusals."""

    def __init__(self, app: ASGIApp, pins: PinCheck, time_limit_s: int) -> None:
        self._app = app
        self._pins = pins
        self._time_limit_s = time_limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_open = scope["path"] in OPEN_PATHS
        scope["arrived"] = time.monotonic()
        scope["context"] = {"path": re.sub("[0-9]{6,}", "*", scope["path"][:100])}  # no account, no PIN
        try:
            async with asyncio.timeout(None if is_open else self._time_limit_s) as scope["limit"]:
                if not is_open:
                    scope["account"] = await self._authenticate(scope)
                await self._app(scope, receive, send)
            return
        except Refusal as raised:
            refusal = raised
        except (TimeoutError, asyncio.CancelledError):  # or the server is stopping
            if scope["limit"].when() is None or "id_transaksi" in scope["context"]:  # being answered
                raise
            refusal = Refusal("unavailable", "time limit")  # in a PIN check or a read
        except Exception:
            log.exception("unexpected error", extra=scope["context"])
            refusal = Refusal("unexpected")
        context = scope["context"] | {"status": refusal.status, "remark": refusal.remark}
        context |= {"reason": refusal.reason, "duration_ms": elapsed_ms(scope)}
        log.warning("request refused", extra=context)
        response = JSONResponse({"remark": refusal.remark}, refusal.status, refusal.headers)
        await response(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> str:
        try:
            account, pin = parse(headers(scope, b"authorization"))
            scope["context"]["no_rekening"] = masked(account)
            await self._pins.check(account, pin)
        except Refusal:
            await asyncio.sleep(scope["arrived"] + MIN_401_S - time.monotonic())
            raise
        return account


def headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def elapsed_ms(scope: Scope) -> float:
    arrived: float = scope["arrived"]
    return round((time.monotonic() - arrived) * 1000, 1)


async def on_http_exception(_: Request, error: HTTPException) -> Response:
    """Turn the router's 404 and 405 into refusals."""
    raise Refusal(str(error.status_code), headers=error.headers)


class PlainRoute(APIRoute):
    """Calls the endpoint with the request alone: FastAPI's own machinery costs 40 % of a request's CPU.

    https://fastapi.tiangolo.com/how-to/custom-request-and-route/
    """

    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            if not scope["limit"].expired():  # a slow reader must not be told that nothing was carried out
                scope["limit"].reschedule(None)
            await response(scope, receive, send)

        self.app = app


router = APIRouter(route_class=PlainRoute)
PIN = [Security(HTTPBasic(scheme_name="PIN"))]  # documents what `Gate` does
MOVEMENT: dict[str, Any] = {
    "response_model": payloads.Balance,
    "responses": documented(400, 401, 408, 413, 415, 422, 503),
    "openapi_extra": payloads.MOVEMENT_DOCUMENT,
    "dependencies": PIN,
}


@router.post("/tabung", **MOVEMENT)
async def tabung(request: Request) -> Response:
    """Deposit."""
    return await move(request, "tabung")


@router.post("/tarik", **MOVEMENT)
async def tarik(request: Request) -> Response:
    """Withdraw."""
    return await move(request, "tarik")


async def move(request: Request, jenis_transaksi: JenisTransaksi) -> Response:
    """Carry out the deposit or withdrawal that the request asks for."""
    scope, context = request.scope, request.scope["context"]
    payload = validate(payloads.MovementRequest.model_validate_json, await read_body(request))
    key = idempotency_key(scope)
    context |= {"jenis_transaksi": jenis_transaksi, "nominal": payload.nominal}
    trace.get_current_span().set_attributes(context)
    if payload.no_rekening != scope["account"]:
        context["no_rekening_payload"] = masked(payload.no_rekening)
        raise Refusal("unknown_account")
    command = Command(jenis_transaksi, payload.no_rekening, payload.nominal, key, traceparent())
    result = await request.app.state.teller.submit(command)
    movement, replayed = (result.first, True) if isinstance(result, Replay) else (result, False)
    context |= {"saldo": movement.saldo_akhir, "id_transaksi": movement.id_transaksi}
    context["duration_ms"] = elapsed_ms(scope)
    log.info("movement replayed" if replayed else "movement accepted", extra=context)
    extra = {"Idempotent-Replayed": "true"} if replayed else None
    return Response(b'{"saldo":%d}' % movement.saldo_akhir, 200, extra, "application/json")


async def read_body(request: Request) -> bytes:
    """The payload. Raises `Refusal` if it is not JSON, too large, too late or cut off."""
    if not any(JSON.fullmatch(value) for value in headers(request.scope, b"content-type")):
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


def idempotency_key(scope: Scope) -> str | None:
    """The request's key, if it has one. Raises `Refusal` for a malformed one and for two."""
    keys = [value.decode("latin-1") for value in headers(scope, b"idempotency-key")]
    if len(keys) > 1 or not all(re.fullmatch(payloads.KEY, key) for key in keys):
        raise Refusal("Idempotency-Key")
    return keys[0] if keys else None


@router.get("/saldo", response_model=payloads.Balance, responses=documented(401, 503), dependencies=PIN)
async def saldo(request: Request) -> Response:
    """The customer's balance."""
    balance = await read(request, datastore.find_balance)
    log.info("balance read", extra=request.scope["context"] | {"duration_ms": elapsed_ms(request.scope)})
    return JSONResponse({"saldo": balance})


@router.get(
    "/mutasi",
    response_model=payloads.Statement,
    responses=documented(400, 401, 503),
    openapi_extra=payloads.STATEMENT_DOCUMENT,
    dependencies=PIN,
)
async def mutasi(request: Request) -> Response:
    """The customer's booked movements, newest first, page by page."""
    page = validate(payloads.StatementRequest.model_validate, dict(request.query_params))
    # One more than asked for tells whether there is a next page.
    rows = await read(request, datastore.find_mutations, page.sebelum, page.batas + 1)
    statement = payloads.Statement(mutasi=rows[: page.batas], sebelum=None)
    if len(rows) > page.batas:
        statement.sebelum = statement.mutasi[-1].id_transaksi
    facts = {"count": len(statement.mutasi), "duration_ms": elapsed_ms(request.scope)}
    log.info("statement read", extra=request.scope["context"] | facts)
    return Response(statement.model_dump_json(), media_type="application/json")


async def read(request: Request, function: Callable[..., Any], *arguments: Any) -> Any:
    """Read from the datastore for the customer. Raises `Refusal` if the database is away."""
    try:
        return await request.app.state.reads.run(function, request.scope["account"], *arguments)
    except DBAPIError as error:
        raise Refusal("unavailable", f"database: {describe(error)}") from None


@router.get("/health", responses=documented(503))
async def health(request: Request) -> Response:
    """Whether PostgreSQL answers. Redis does not matter: movements wait for it in PostgreSQL."""
    state = request.app.state
    if not state.health or state.health.done():  # concurrent callers share one question
        state.health = state.reads.run(datastore.ping)
    done, _ = await asyncio.wait([state.health], timeout=2)
    if not done or state.health.exception():
        raise Refusal("unavailable", "PostgreSQL does not answer")
    return JSONResponse({"status": "ok"})
