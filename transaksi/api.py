"""The HTTP edge: routes, payloads, the PIN middleware. How requests are refused stands in refusals.py."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic
from opentelemetry import trace
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from telemetry import flush, masked, traceparent
from transaksi.app import MAX_NOMINAL, MAX_SALDO, Jenis, Perintah, Ulangan, Unavailable, authorize
from transaksi.pin import NotAuthenticated, PinCheck, parse
from transaksi.refusals import CHALLENGE, COBA_LAGI, HANDLERS, PIN_SALAH, REFUSALS, REMARKS, RETRY, answers, refuse
from transaksi.relay import Relay
from transaksi.teller import Teller

log = logging.getLogger(__name__)

MAX_BODY = 4096
MAX_KEY, PRINTABLE = 255, "^[ -~]+$"
JSON = re.compile(rb"application/([^;]+\+)?json\s*(;.*)?", re.IGNORECASE)
OPEN_PATHS = ("/health", "/docs", "/openapi.json")  # operator pages, no customer data


class Permintaan(BaseModel):
    """A deposit or a withdrawal of `nominal` whole rupiah."""

    model_config = ConfigDict(strict=True)
    no_rekening: str = Field(pattern="^[0-9]{10,16}$", examples=["1234567890"])
    nominal: int = Field(ge=1, le=MAX_NOMINAL, examples=[50000])


class Saldo(BaseModel):
    """The balance in whole rupiah, right after the movement."""

    saldo: int = Field(ge=0, le=MAX_SALDO, examples=[1050000])


Key = Annotated[
    Annotated[str, Field(min_length=1, max_length=MAX_KEY, pattern=PRINTABLE)] | SkipJsonSchema[None],
    Header(alias="Idempotency-Key", description="Makes repeating safe: the same key moves the money once"),
]


class PinMiddleware:
    """Lets nobody pass but a customer who has proved his account by PIN; reads no payload.

    Also the outermost place, which turns an unexpected error into a 500 with a log line.
    """

    def __init__(self, app: ASGIApp, pin: PinCheck, request_timeout: int) -> None:
        self._app = app
        self._pin = pin
        self._request_timeout = request_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["arrived"] = time.monotonic()
        scope["deadline"] = asyncio.get_running_loop().time() + self._request_timeout
        scope["context"] = {"path": scope["path"][:100]}
        try:
            if scope["path"] not in OPEN_PATHS:
                scope["nasabah"] = await self._authenticate(scope)
            await self._app(scope, receive, send)
            return
        except NotAuthenticated as cause:
            response = refuse(Request(scope), 401, PIN_SALAH, CHALLENGE, cause=str(cause))
        except Unavailable:
            response = refuse(Request(scope), 503, COBA_LAGI, RETRY)
        except Exception:
            log.exception("unexpected error", extra=scope["context"])
            response = refuse(Request(scope), 500, REMARKS[500])
        await response(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> str:
        authorization = header(scope, b"authorization")
        if len(authorization) != 1:
            raise NotAuthenticated("no Authorization header" if not authorization else "two of them")
        no_rekening, pin = parse(authorization[0])
        scope["context"]["no_rekening"] = masked(no_rekening)
        await self._pin.check(no_rekening, pin, scope["arrived"], scope["deadline"])
        return no_rekening


def header(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


async def payload(request: Request) -> Permintaan:
    """What the customer wishes; raises `HTTPException` and `RequestValidationError` where it cannot be read."""
    if not any(JSON.fullmatch(value) for value in header(request.scope, b"content-type")):
        raise HTTPException(415)
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise HTTPException(413)
        return Permintaan.model_validate_json(body)
    except ClientDisconnect:
        raise HTTPException(400) from None
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None


def idempotency_key(request: Request) -> str | None:
    """The request's key, if it has one; raises `RequestValidationError` for a bad one and for two."""
    keys = [value.decode("latin-1") for value in header(request.scope, b"idempotency-key")]
    if len(keys) > 1 or not all(len(key) <= MAX_KEY and re.fullmatch(PRINTABLE, key) for key in keys):
        raise RequestValidationError([{"loc": ("header", "idempotency-key")}])
    return keys[0] if keys else None


class MovementRoute(APIRoute):
    """Reads payload and header itself: to let FastAPI do it costs a quarter of a request's CPU.

    The hook is https://fastapi.tiangolo.com/how-to/custom-request-and-route/; FastAPI's own document still says what
    the endpoint's signature says.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            try:
                async with asyncio.timeout_at(request.scope["deadline"]):  # the teller has its own answer to it
                    response: Response = await self.endpoint(request, await payload(request), idempotency_key(request))
                    return response
            except (TimeoutError, asyncio.CancelledError):  # or the server is stopping
                raise HTTPException(408) from None

        return handle


REPLAYED = {
    "headers": {
        "Idempotent-Replayed": {
            "schema": {"type": "string", "enum": ["true"]},
            "description": "This is the first answer again",
        }
    }
}


def create_app(teller: Teller, relay: Relay, pin: PinCheck, request_timeout: int) -> FastAPI:
    """The ASGI application; starts and stops teller and relay."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        teller.start()
        relay.start()
        yield
        teller.stop()
        relay.stop()
        pin.stop()
        flush()

    app = FastAPI(
        title="transaksi",
        version="1.0.0",
        description="Deposits and withdrawals of a tiny savings bank. Amounts are whole rupiah.",
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        redoc_url=None,
        redirect_slashes=False,
        swagger_ui_oauth2_redirect_url=None,
        telemetry={
            "operation_spans": False,
            "metrics": False,
            "logs": False,
            "exclude": lambda scope: scope.get("path") in OPEN_PATHS,
        },
    )
    app.add_middleware(PinMiddleware, pin=pin, request_timeout=request_timeout)

    async def move(jenis: Jenis, request: Request, permintaan: Permintaan, key: str | None) -> Response:
        scope = request.scope
        context = scope["context"]
        context |= {"jenis_transaksi": jenis, "nominal": permintaan.nominal}
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes(context)
        if permintaan.no_rekening != scope["nasabah"]:
            context["no_rekening_payload"] = masked(permintaan.no_rekening)
        authorize(scope["nasabah"], permintaan.no_rekening)
        perintah = Perintah(jenis, permintaan.no_rekening, permintaan.nominal, key, traceparent())
        hasil = await teller.submit(perintah)
        repeated = isinstance(hasil, Ulangan)
        gerakan = hasil.pertama if isinstance(hasil, Ulangan) else hasil
        context |= {
            "saldo": gerakan.saldo_akhir,
            "id_transaksi": gerakan.id_transaksi,
            "duration_ms": round((time.monotonic() - scope["arrived"]) * 1000, 1),
        }
        log.info("movement answered again" if repeated else "movement accepted", extra=context)
        headers = {"Idempotent-Replayed": "true"} if repeated else None
        return Response(b'{"saldo":%d}' % gerakan.saldo_akhir, headers=headers, media_type="application/json")

    documented: dict[str, Any] = {
        "response_model": Saldo,
        "responses": REFUSALS | {200: REPLAYED},
        "dependencies": [Security(HTTPBasic(scheme_name="PIN"))],  # for the document: PinMiddleware sees to it
    }

    async def tabung(request: Request, permintaan: Permintaan, idempotency_key: Key = None) -> Response:
        """Deposit."""
        return await move("tabung", request, permintaan, idempotency_key)

    async def tarik(request: Request, permintaan: Permintaan, idempotency_key: Key = None) -> Response:
        """Withdraw."""
        return await move("tarik", request, permintaan, idempotency_key)

    for endpoint in (tabung, tarik):
        path = f"/{endpoint.__name__}"
        app.router.add_api_route(path, endpoint, methods=["POST"], route_class_override=MovementRoute, **documented)

    @app.get("/health", responses={503: answers("Cannot serve", COBA_LAGI)})
    async def health() -> Any:
        """Whether a movement could be made now; Redis away does not matter."""
        if await teller.can_serve():
            return {"status": "ok"}
        return JSONResponse({"remark": "PostgreSQL tidak menjawab atau antrean penuh."}, 503)

    return app
