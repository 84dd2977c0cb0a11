"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: a client needs no PIN to get here.

A `ValueError` raised while a request is parsed ends the connection with uvicorn's plain 400.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 65_536  # bytes
MAX_FIELDS = 100
MAX_PIPELINED = 16


class BoundedHttp(HttpToolsProtocol):
    """Bounds heads and pipelines, and answers no request with the parser's error for another."""

    unparsed = 0  # bytes since the last complete head or piece of a payload
    head = 0  # bytes of the fields of this head
    in_head = True
    upgraded = False

    def data_received(self, data: bytes) -> None:
        if self.upgraded:  # what follows is the payload of a request that was parsed without it
            return
        self.unparsed += len(data)
        super().data_received(data)
        if self.unparsed > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("Request head too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head, self.in_head = 0, True

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head += len(name) + len(value)
        if self.head > MAX_HEAD or len(self.headers) >= MAX_FIELDS:
            raise ValueError("head too large")
        if self.in_head:  # the fields of a trailer are no headers (RFC 9110, section 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many pipelined requests")
        self.unparsed, self.in_head = 0, False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.unparsed = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        if self.cycle and not self.cycle.response_complete:  # it would be taken for this request's answer
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _unsupported_upgrade_warning(self) -> None:
        self.upgraded = True
        self.cycle.keep_alive = False
