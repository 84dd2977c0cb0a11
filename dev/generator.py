"""The load generator of the benchmark: a thread and a raw socket per connection.

The services lack the CPU it uses, so it has no HTTP library.
"""

import socket
import time
from base64 import b64encode
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle, islice
from math import inf
from typing import NamedTuple

from dev.local import HOST, PIN

Figure = dict[str, float]
Answer = tuple[bytes, float, float]  # its text, when its request was sent, when it came


class Load(NamedTuple):
    """Requests that some connections, spread over the ports, send in turn."""

    ports: Sequence[int]
    requests: Sequence[bytes]
    connections: int = 64
    seconds: float = 2  # inf: each request once
    statuses: Sequence[bytes] = (b"200",)  # those that may come back
    rate: float = inf  # requests per second


def http(path: str, no_rekening: str, pin: str = PIN) -> bytes:
    """Return a whole request: a GET of /saldo or /mutasi, otherwise a POST of 1,000 rupiah."""
    method = "GET" if path in ("/saldo", "/mutasi") else "POST"
    body = f'{{"no_rekening": "{no_rekening}", "nominal": 1000}}' if method == "POST" else ""
    credentials = b64encode(f"{no_rekening}:{pin}".encode()).decode()
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Basic {credentials}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def percentiles(seconds: Iterable[float]) -> Figure:
    ordered = sorted(seconds)
    return {f"p{p} ms": 1000 * ordered[len(ordered) * p // 100] for p in (50, 99)}


def measure(load: Load) -> Figure:
    """Send a load and return its figure."""
    answers = send(load)
    seconds = max(came for _, _, came in answers) - min(sent for _, sent, _ in answers)
    figure = {"count": len(answers), "per second": len(answers) / seconds}
    return figure | percentiles(came - sent for _, sent, came in answers)


def send(load: Load) -> list[Answer]:
    """Send a load. Returns its answers."""
    answers: list[Answer] = []
    began = time.monotonic()
    requests = load.requests if load.seconds == inf else cycle(load.requests)
    todo = zip(count(began, 1 / load.rate), requests, strict=False)  # with the times they are due

    def keep_busy(port: int) -> None:
        with socket.create_connection((HOST, port), timeout=30) as connection:
            for due, request in todo:
                if (pause := due - time.monotonic()) > 0:
                    time.sleep(pause)
                sent = time.monotonic()
                if sent > began + load.seconds:
                    break
                connection.sendall(request)
                text = b""
                while not (text.endswith(b"}") and text.count(b"{") == text.count(b"}")):
                    part = connection.recv(65_536)
                    assert part, "a service closed a connection"
                    text += part
                answers.append((text, sent, time.monotonic()))
                assert text[9:12] in load.statuses, text

    with ThreadPoolExecutor(load.connections) as pool:
        list(pool.map(keep_busy, islice(cycle(load.ports), load.connections)))
    return answers
