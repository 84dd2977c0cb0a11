"""Middleware: the request log with its timeout, authentication, and the payload limit."""

import asyncio
import base64
import re
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from opentelemetry import trace
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    SimpleUser,
)
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import (
    bind_contextvars,
    clear_contextvars,
    get_contextvars,
)

from common.telemetry import log, mask
from transaksi.api import OPEN_PATHS, error_response
from transaksi.app import (
    Bank,
    BankError,
    NotAuthenticated,
    NotExecuted,
)

# No 401 is sent earlier, so that timing does not reveal the cause: 0.3 s, and 2 ms because
# timers may be early.
MIN_401_S = 0.302
MAX_PAYLOAD = 4096


@dataclass(frozen=True)
class RequestLog:
    """Writes one log line for each request, and answers timeouts and unexpected errors.

    The line has what `bind_contextvars` got while the request was served. At the timeout the
    request is cancelled. If the teller has taken its movement, that ends in OutcomeUnknown.
    """

    app: ASGIApp
    timeout_s: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        arrived = monotonic()
        clear_contextvars()
        # A path may be long, and have an account number or PIN by mistake.
        path = re.sub("[0-9]{6,}", "*", scope["path"][:100])
        bind_contextvars(method=scope["method"], path=path)
        timeout = asyncio.timeout(self.timeout_s)
        answer = Answer(send, arrived, timeout)
        try:
            async with timeout:
                await self.app(simplify(scope), receive, answer)
        except TimeoutError:
            await answer.fail(NotExecuted("timeout"), scope, receive)
        except asyncio.CancelledError:  # by uvicorn, whose own timeout at a stop has passed
            await answer.fail(NotExecuted("the service stops"), scope, receive)
        except Exception as error:
            if not answer.status:  # after the head, an error means that the client has left
                log.exception("unexpected error")
            await answer.fail(error, scope, receive)
        if scope["path"] not in OPEN_PATHS or answer.status >= 500:  # no line for each probe
            duration_ms = round((monotonic() - arrived) * 1000, 1)
            log_outcome(status=answer.status, duration_ms=duration_ms)


@dataclass
class Answer:
    """Sends the answer to a request, and knows its status. Delays a 401."""

    send: Send
    arrived: float
    timeout: asyncio.Timeout
    status: int = 0  # until the answer starts

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] == 401:
                await asyncio.sleep(self.arrived + MIN_401_S - monotonic())
            self.status = message["status"]
            # How long the client takes to read the answer does not count.
            with suppress(RuntimeError):  # the timeout has expired or ended
                self.timeout.reschedule(None)
            span = trace.get_current_span()
            if span.is_recording():
                span.set_attributes(get_contextvars())
        await self.send(message)

    async def fail(self, error: Exception, scope: Scope, receive: Receive) -> None:
        """Answer an error, if no answer has started."""
        if not self.status:
            await error_response(error)(scope, receive, self)


def simplify(scope: Scope) -> Scope:
    """Serve HEAD like GET (uvicorn leaves out the body of its answer), and ignore Range.

    A server may ignore it: https://www.rfc-editor.org/rfc/rfc9110#section-14.2
    """
    if scope["method"] == "HEAD":
        scope = {**scope, "method": "GET"}
    if scope["path"] in OPEN_PATHS:
        headers = [header for header in scope["headers"] if header[0] != b"range"]
        scope = {**scope, "headers": headers}
    return scope


def log_outcome(**outcome: float) -> None:
    """Write the log line of a request, with the level of its `status`."""
    if outcome["status"] >= 500:
        log.error("request failed", **outcome)
    elif outcome["status"] >= 400:
        log.warning("request refused", **outcome)
    else:
        log.info("request answered", **outcome)


# ---------------------------------------------------------------- authentication

CREDENTIALS = re.compile(rb"([0-9]{10,16}):([0-9]{6})")


@dataclass(frozen=True)
class Credentials:
    """What the Authorization header says."""

    account: str
    pin: str


@dataclass(frozen=True)
class BasicAuthentication(AuthenticationBackend):
    """Authenticates by account number and PIN. The account is `request.user.username`."""

    bank: Bank

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        if conn.scope["path"] in OPEN_PATHS:
            return None
        try:
            credentials = parse_credentials(conn.headers.getlist("authorization"))
            bind_contextvars(no_rekening=mask(credentials.account))
            await self.bank.authenticate(credentials.account, credentials.pin)
        except BankError as error:
            raise AuthenticationError from error
        return AuthCredentials(), SimpleUser(credentials.account)


def parse_credentials(headers: list[str]) -> Credentials:
    """Parse the one Authorization header (RFC 7617). Raises NotAuthenticated."""
    scheme, _, token = "".join(headers[:1]).partition(" ")
    try:
        match = CREDENTIALS.fullmatch(base64.b64decode(token.strip(), validate=True))
    except ValueError:
        match = None
    if len(headers) != 1 or scheme.lower() != "basic" or not match:
        raise NotAuthenticated("missing or malformed credentials")
    return Credentials(match[1].decode(), match[2].decode())


def refuse_authentication(_: HTTPConnection, error: AuthenticationError) -> Response:
    """Answer the bank's error, which Starlette lets through only as the cause of its own."""
    assert isinstance(error.__cause__, BankError)
    return error_response(error.__cause__)


# ---------------------------------------------------------------- the payload


@dataclass(frozen=True)
class PayloadLimit:
    """Refuses payloads of over 4 KiB, however they are sent.

    Not by FastAPI's `max_body_size`, because that answers in plain text.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_PAYLOAD:
                raise HTTPException(413)
            return message

        await self.app(scope, receive_limited, send)
