"""The load generator of the benchmark: raw sockets in a process of its own.

What it uses of the CPU, the services lack: so neither an HTTP library nor asyncio.
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

from conftest import PIN
from dev.local import HOST

Figure = dict[str, float]


class Failed(Exception):
    """Why a load has no figure."""


class Load(NamedTuple):
    """Requests sent in turn over some connections, for some time or each once."""

    port: int
    requests: Sequence[bytes]
    connections: int
    seconds: float  # inf: each request once
    statuses: tuple[bytes, ...] = (b"200",)  # those that may come back
    rate: float = 0  # requests a second; 0: as many as possible


def http(path: str, no_rekening: str, pin: str = PIN) -> bytes:
    """A whole request: to /tabung a POST of 1,000 rupiah, otherwise a GET."""
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


def fire(load: Load) -> tuple[Figure, list[tuple[int, float, float, bytes]]]:
    """Send a load. Returns its figure and, of a paced one, the answers: number, sent, received, text."""
    todo = enumerate(load.requests if load.seconds == inf else cycle(load.requests))
    busy: dict[Any, tuple[int, float]] = {}  # connection -> number of the request, time it was sent
    parts: dict[Any, bytes] = defaultdict(bytes)
    answers: list[tuple[int, float, float, bytes]] = []
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        idle = [socket.create_connection((HOST, load.port)) for _ in range(load.connections)]
        for connection in idle:
            stack.enter_context(connection).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(connection, selectors.EVENT_READ)
        cpu, began = time.process_time(), time.monotonic()
        now = due = began
        end = began + load.seconds
        while True:
            while idle and due <= now < end and (job := next(todo, None)):
                busy[idle[-1]] = job[0], time.monotonic()
                idle.pop().sendall(job[1])
                due += 1 / load.rate if load.rate else 0
            pausing = load.rate and idle and now < end
            if not busy and not pausing:
                break
            events = selector.select(max(0, due - now) if pausing else 30)
            if not events and not pausing:
                raise Failed("no answer within 30 s")
            for key, _ in events:
                source: Any = key.fileobj
                if not (part := source.recv(65_536)):
                    raise Failed("the server closed a connection")
                parts[source] = answer = parts[source] + part
                if answer.endswith(b"}") and answer.count(b"{") == answer.count(
                    b"}"
                ):  # all of the JSON
                    answers.append((*busy.pop(source), time.monotonic(), parts.pop(source)))
                    idle.append(source)
            now = time.monotonic()
    cpu, number = time.process_time() - cpu, len(answers)
    if unexpected := {answer[9:12] for *_, answer in answers}.difference(load.statuses):
        raise Failed(f"answers {unexpected}")
    figure = {
        "count": number,
        "a second": number / (now - began),
        "generator us": cpu / number * 1e6,
    }
    figure |= percentiles(received - sent for _, sent, received, _ in answers)
    return figure, answers if load.rate else []
