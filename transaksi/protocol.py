"""uvicorn's HTTP/1.1 protocol, with the limits that it lacks.

Unauthenticated clients reach it, so nothing that they send may take much memory or time.
"""

import asyncio
from typing import cast

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    HttpToolsProtocol,
    RequestResponseCycle,
)

from common.telemetry import log

MAX_HEAD = 16_384  # bytes
OVERHEAD = 32  # bytes that a header costs besides its text, as in RFC 9113, section 6.5.2
MAX_PIPELINED = 16
MAX_CONNECTIONS = 1000
LINGER_S = 1  # in which a client that is still sending can read a refusal, before a reset


class JoinedAnswer:
    """A transport that holds the head of an answer until the body, and sends both at once.

    uvicorn writes them one after the other, which costs a packet and a system call.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None  # b"" when it has been sent
        self.is_closing = transport.is_closing
        self.close = transport.close

    def write(self, data: bytes) -> None:
        if self._head is None and data.startswith(b"HTTP/1.1 100"):
            self._transport.write(data)
        elif self._head is None:
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""


class BoundedHttp(HttpToolsProtocol):
    """Limits request heads, pipelined requests and connections.

    Bytes that follow a request cannot change how it is read or answered, and are not taken
    for another request by mistake.
    """

    head_timeout_s = 5
    warned = False

    unparsed = 0  # bytes received since the last whole head or piece of a payload
    ignores_input = False
    is_new = True  # nothing was read yet
    idle_since = 0.0  # seconds of the event loop's clock
    head_timer: asyncio.TimerHandle | None = None
    running: RequestResponseCycle | None = None  # the request that is, or was last, served

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self.expect_head()
        if len(self.connections) > MAX_CONNECTIONS:
            self.drop_idle_connection()

    def drop_idle_connection(self) -> None:
        """Close the connection that has been idle for longest, maybe this new one.

        A connection is idle while we wait for its client: for a head, or for it to read an
        answer. New ones come last: many may be accepted before the first of them is read.
        """
        if not BoundedHttp.warned:
            log.warning("connection limit reached", limit=MAX_CONNECTIONS)
            BoundedHttp.warned = True
        connections = cast(set[BoundedHttp], self.connections)
        idle = [one for one in connections if not one.running or one.running.response_started]
        oldest = min(idle, key=lambda one: (one.is_new, one.idle_since))
        connections.discard(oldest)
        oldest.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self.running = cycle
        if cycle.scope["method"] != "HEAD":  # no body follows its head
            cycle.transport = cast(asyncio.Transport, JoinedAnswer(self.transport))
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_head_timer()
        if self.running:  # uvicorn tells only the last one of pipelined requests
            self.running.disconnected = True
            self.running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.is_new = False
        if self.ignores_input:
            return
        self.unparsed += len(data)
        super().data_received(data)
        if self.unparsed > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("Request head too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.expect_head()

    def expect_head(self) -> None:
        """Close the connection unless a whole head arrives in time."""
        self.stop_head_timer()
        self.head_timer = self.loop.call_later(self.head_timeout_s, self.on_head_timeout)

    def stop_head_timer(self) -> None:
        if self.head_timer:
            self.head_timer.cancel()

    def on_head_timeout(self) -> None:
        if self.running and not self.running.response_complete:
            self.expect_head()  # a request is being served: wait for the next head
        else:
            self.transport.close()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(
            len(name) + len(value) + OVERHEAD for name, value in self.headers
        )
        if size > MAX_HEAD or len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError  # the parser turns it into its own error: uvicorn answers 400
        super().on_headers_complete()
        self.stop_head_timer()
        self.unparsed = 0
        self.headers = []  # the fields of a trailer are no headers (RFC 9110, section 6.5.1)

    def on_body(self, body: bytes) -> None:
        self.unparsed = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        is_unread = self.running is not None and self.running.more_body
        super().on_response_complete()
        self.idle_since = self.loop.time()
        if is_unread and not self.transport.is_closing():
            # What is left of the payload must not be taken for the next request.
            self.ignores_input = True
            self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        if self.running and not self.running.response_complete:
            # The client would take a 400 for the answer to that request.
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _unsupported_upgrade_warning(self) -> None:
        # uvicorn calls this when the parser has stopped at an Upgrade: what follows, a payload
        # too, is no next request.
        self.ignores_input = True
        self.cycle.keep_alive = False
