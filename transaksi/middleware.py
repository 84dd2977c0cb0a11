"""The middleware: authentication before routing, the time limit, and the answers to refused requests."""

import asyncio
import logging
import re
import time
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from opentelemetry import trace
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.connections import describe
from common.telemetry import masked
from transaksi.app import REFUSALS, Refusal
from transaksi.pin import PinCheck, parse

log = logging.getLogger(__name__)

# A 401 is never sent earlier, so that its time does not tell its cause. 0.3 s, and the timer's precision.
MIN_401_S = 0.302
SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
OPEN_PATHS = {"/health", "/docs", "/openapi.json", *(f"/static-offline-docs/{name}" for name in SWAGGER)}


class Gate:
    """Middleware: authenticates every request, ends it at the time limit, answers refusals, logs the outcome.

    Endpoints find the customer's account in `scope["account"]`, and put what the log line shows of a request
    into `scope["context"]`.
    """

    def __init__(self, app: ASGIApp, pins: PinCheck, time_limit_s: int) -> None:
        self._app = app
        self._pins = pins
        self._time_limit_s = time_limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()
        is_open = scope["path"] in OPEN_PATHS
        path = re.sub("[0-9]{6,}", "*", scope["path"][:100])  # no account number, no PIN
        context = scope["context"] = {"path": path}

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                context["status"] = message["status"]
                trace.get_current_span().set_attributes(context)
            await send(message)

        try:
            async with asyncio.timeout(None if is_open else self._time_limit_s):
                if not is_open:
                    scope["account"] = await self._authenticate(scope, arrived)
                await self._app(scope, receive, respond)
            refusal = None
        except Refusal as raised:
            refusal = raised
        except (TimeoutError, asyncio.CancelledError):  # or the server is stopping
            if "status" in context:
                raise
            refusal = Refusal("unavailable", "time limit")  # in a PIN check or a read
        except DBAPIError as error:
            refusal = Refusal("unavailable", describe(error))
        except Exception:
            log.exception("unexpected error", extra=context)
            refusal = Refusal("unexpected")
        context["duration_ms"] = round((time.monotonic() - arrived) * 1000, 1)
        if refusal:
            context |= {"status": refusal.status, "remark": refusal.remark, "reason": refusal.reason}
            log.warning("request refused", extra=context)
            trace.get_current_span().set_attributes(context)
            response = JSONResponse({"remark": refusal.remark}, refusal.status, refusal.headers)
            await response(scope, receive, send)
        elif not is_open:
            log.info(scope.get("event", "request answered"), extra=context)

    async def _authenticate(self, scope: Scope, arrived: float) -> str:
        try:
            account, pin = parse(Headers(scope=scope).getlist("authorization"))
            scope["context"]["no_rekening"] = masked(account)
            await self._pins.check(account, pin)
        except Refusal:
            await asyncio.sleep(arrived + MIN_401_S - time.monotonic())
            raise
        return account


async def refuse(_: Request, error: Any) -> Response:
    """Turn errors of FastAPI and pydantic into refusals: 404, 405, and a malformed payload or query."""
    if isinstance(error, HTTPException):
        raise Refusal(str(error.status_code), headers=error.headers)
    fields = [str(part) for problem in error.errors() for part in problem["loc"]]
    raise Refusal(next((field for field in fields if field in REFUSALS), "not_json"))


HANDLERS = dict.fromkeys((HTTPException, RequestValidationError, ValidationError), refuse)
