"""The load generator of the benchmark: raw sockets in a process of its own.

What it uses of the CPU, the services lack, so it has neither an HTTP library nor asyncio.
"""

import selectors
import socket
import time
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import cycle
from math import inf
from typing import Any, NamedTuple

from dev.local import HOST, PIN

Figure = dict[str, float]


class Load(NamedTuple):
    """Requests sent in turn over some connections, for some time or each once."""

    port: int
    requests: Sequence[bytes]
    connections: int
    seconds: float = inf  # inf: each request once
    statuses: tuple[bytes, ...] = (b"200",)  # those that may come back
    rate: float = inf  # requests per second


class Answer(NamedTuple):
    """The text of an answer, and when its request was sent and it was received."""

    text: bytes
    sent: float
    received: float


def http(path: str, no_rekening: str, pin: str = PIN) -> bytes:
    """Return a whole request: to /tabung a POST of 1,000 rupiah, otherwise a GET."""
    credentials = b64encode(f"{no_rekening}:{pin}".encode()).decode()
    body = f'{{"no_rekening": "{no_rekening}", "nominal": 1000}}' if path == "/tabung" else ""
    return (
        f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: {HOST}\r\n"
        f"Authorization: Basic {credentials}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def percentiles(seconds: Iterable[float]) -> Figure:
    ordered = sorted(seconds)
    return {f"p{p} ms": 1000 * ordered[len(ordered) * p // 100] for p in (50, 99)}


def measure(load: Load) -> Figure:
    """Send a load and return its figure."""
    answers = send(load)
    seconds = max(answer.received for answer in answers) - answers[0].sent
    figure = {"count": len(answers), "per second": len(answers) / seconds}
    return figure | percentiles(answer.received - answer.sent for answer in answers)


def send(load: Load) -> list[Answer]:
    """Send a load. Returns its answers."""
    todo = iter(load.requests if load.seconds == inf else cycle(load.requests))
    busy: dict[Any, float] = {}  # connection -> when its request was sent
    parts: dict[Any, bytes] = defaultdict(bytes)
    answers: list[Answer] = []
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        idle = []
        for _ in range(load.connections):
            idle.append(stack.enter_context(socket.create_connection((HOST, load.port))))
            selector.register(idle[-1], selectors.EVENT_READ)
        now = due = time.monotonic()
        end = now + load.seconds
        while True:
            while idle and due <= now < end and (request := next(todo, None)):
                busy[idle[-1]] = time.monotonic()
                idle.pop().sendall(request)
                due += 1 / load.rate
            pausing = load.rate < inf and idle and now < end
            if not busy and not pausing:
                break
            for key, _ in selector.select(max(0, due - now) if pausing else 1):
                source: Any = key.fileobj
                parts[source] = text = parts[source] + source.recv(65_536)
                if text.endswith(b"}") and text.count(b"{") == text.count(b"}"):  # all of the JSON
                    answers.append(Answer(parts.pop(source), busy.pop(source), time.monotonic()))
                    idle.append(source)
            now = time.monotonic()
            if busy and now > max(busy.values()) + 30:
                raise RuntimeError("no answer within 30 s")
    if unexpected := {answer.text[9:12] for answer in answers}.difference(load.statuses):
        raise RuntimeError(f"answers {unexpected}")
    return answers
