"""Load on the API: connections kept busy by a thread of their own, and what came back for each request."""

import asyncio
import base64
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType
from typing import Self
from uuid import uuid4

from conftest import PIN

Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(eq=False)
class Movement:
    """One request, sent once, and its answer: `status` stays None where none came, or half of one."""

    no_rekening: str
    jenis: str
    nominal: int
    key: str
    sent: float = 0
    took: float = 0
    status: int | None = None
    headers: str = ""
    body: bytes = b""

    @property
    def moved(self) -> bool:
        return self.status == 200

    @property
    def uncertain(self) -> bool:
        """Whether the client was left not knowing."""
        return self.status is None or (self.status == 503 and "\nretry-after:" not in self.headers)

    @property
    def saldo(self) -> int:
        return int(json.loads(self.body)["saldo"])

    def again(self) -> "Movement":
        """The same request under the same key, to be sent."""
        return Movement(self.no_rekening, self.jenis, self.nominal, self.key)

    def request(self) -> bytes:
        payload = json.dumps({"no_rekening": self.no_rekening, "nominal": self.nominal})
        credentials = base64.b64encode(f"{self.no_rekening}:{PIN}".encode()).decode()
        return (
            f"POST /{self.jenis} HTTP/1.1\r\nHost: bank\r\nAuthorization: Basic {credentials}\r\n"
            f"Idempotency-Key: {self.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n{payload}"
        ).encode()


def movement(no_rekening: str, jenis: str = "tabung", nominal: int = 1) -> Movement:
    return Movement(no_rekening, jenis, nominal, key=uuid4().hex)


def mixed(accounts: Sequence[str]) -> Iterator[Movement]:
    """Deposits and withdrawals of up to 1000 rupiah, without end."""
    while True:
        yield movement(random.choice(accounts), random.choice(("tabung", "tarik")), random.randint(1, 1000))


class Load(Thread):
    """Sends movements over `connections` connections, spread over the urls; refused ones are tried again.

    In a `with` block it goes on until the end of the block, and then waits for the answers still to come.
    """

    def __init__(self, movements: Iterable[Movement], *urls: str, connections: int = 16) -> None:
        super().__init__(name="load", daemon=True)
        self.sent: list[Movement] = []  # in the order of their ends, answered or not
        self._movements = iter(movements)
        self._ports = [int(url.rpartition(":")[2]) for url in urls]
        self._connections = connections
        self._stopping = Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trail: TracebackType | None
    ) -> None:
        self._stopping.set()
        self.join()

    def count(self, status: int) -> int:
        return sum(m.status == status for m in self.sent)

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._connections):
                group.create_task(self._keep_busy(self._ports[number % len(self._ports)]))

    async def _keep_busy(self, port: int) -> None:
        line: Line | None = None
        for m in self._movements:
            while line is None:
                if self._stopping.is_set():
                    return
                try:
                    line = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
            m.sent = time.monotonic()
            with suppress(OSError, EOFError, TimeoutError):  # the movement stays without an answer
                async with asyncio.timeout(40):
                    await _exchange(m, *line)
            m.took = time.monotonic() - m.sent
            self.sent.append(m)
            if m.status is None or "\nconnection: close" in m.headers:
                line[1].close()
                line = None
            if self._stopping.is_set():
                break
        if line:
            line[1].close()


async def _exchange(m: Movement, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(m.request())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    body = await reader.readexactly(int(head.partition("\ncontent-length:")[2].split()[0]))
    m.status, m.headers, m.body = int(head.split()[1]), head, body


def send(movements: Sequence[Movement], url: str) -> Sequence[Movement]:
    """Send these at once, each on a connection of its own, and wait for the answers."""
    with Load(movements, url, connections=len(movements)) as load:
        load.join(timeout=60)
    return movements
