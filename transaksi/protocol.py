"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: a client needs no PIN to get here."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 65_536  # bytes
MAX_PIPELINED = 16


class BoundedHttp(HttpToolsProtocol):
    """Bounds heads and pipelines. Keeps what follows a request from changing its meaning or its answer."""

    unparsed = 0  # bytes since the parser last reported a whole head or a piece of a payload
    upgraded = False

    def data_received(self, data: bytes) -> None:
        if self.upgraded:  # the parser has stopped: what follows, a payload too, is no next request
            return
        self.unparsed += len(data)
        super().data_received(data)
        if self.unparsed > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("Request head too large.")

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 32 for name, value in self.headers)
        if size > MAX_HEAD or len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError  # ends the connection with uvicorn's 400
        super().on_headers_complete()
        self.unparsed = 0
        self.headers = []  # the fields of a trailer are no headers (RFC 9110, section 6.5.1)

    def on_body(self, body: bytes) -> None:
        self.unparsed = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        if self.cycle and not self.cycle.response_complete:  # this would be taken for its answer
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _unsupported_upgrade_warning(self) -> None:
        self.upgraded = True
        self.cycle.keep_alive = False
