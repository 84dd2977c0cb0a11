"""A load generator: keeps connections busy from a thread of its own and keeps every answer."""

import asyncio
import base64
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Self
from uuid import uuid4

from conftest import PIN, eventually


@dataclass(eq=False)
class Request:
    """A movement asked for once, and the answer; `status` stays None where none came."""

    no_rekening: str
    jenis: str
    nominal: int
    key: str
    took: float = 0
    status: int | None = None
    headers: str = ""
    body: bytes = b""

    @property
    def unknown(self) -> bool:
        """Whether the client cannot tell if money has moved."""
        return self.status is None or (self.status == 503 and "\nretry-after:" not in self.headers)

    @property
    def saldo(self) -> int:
        return int(json.loads(self.body)["saldo"])

    def raw(self) -> bytes:
        payload = json.dumps({"no_rekening": self.no_rekening, "nominal": self.nominal})
        credentials = base64.b64encode(f"{self.no_rekening}:{PIN}".encode()).decode()
        return (
            f"POST /{self.jenis} HTTP/1.1\r\nHost: bank\r\nAuthorization: Basic {credentials}\r\n"
            f"Idempotency-Key: {self.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n{payload}"
        ).encode()


def request(no_rekening: str, jenis: str = "tabung", nominal: int = 1) -> Request:
    return Request(no_rekening, jenis, nominal, key=uuid4().hex)


def mixed(accounts: Sequence[str]) -> Iterator[Request]:
    """Endless deposits and withdrawals of up to 1000 rupiah."""
    while True:
        jenis = random.choice(("tabung", "tarik"))
        yield request(random.choice(accounts), jenis, random.randint(1, 1000))


class Load(Thread):
    """Sends requests over connections spread over the urls; the end of `with` ends it."""

    def __init__(self, requests: Iterable[Request], *urls: str, connections: int = 16) -> None:
        super().__init__(daemon=True)
        self.sent: list[Request] = []  # in the order of their answers
        self._requests = iter(requests)
        self._ports = [int(url.rpartition(":")[2]) for url in urls]
        self._connections = connections
        self._stopping = Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join(timeout=60)

    def count(self, status: int) -> int:
        return sum(r.status == status for r in self.sent)

    def statuses(self) -> set[int | None]:
        return {r.status for r in self.sent}

    def wait(self, more: int = 100) -> None:
        """Return when so many more requests were answered with 200."""
        wanted = self.count(200) + more
        eventually(lambda: self.count(200) >= wanted, 60)

    def run(self) -> None:
        asyncio.run(self._keep_all_busy())

    async def _keep_all_busy(self) -> None:
        ports = [self._ports[n % len(self._ports)] for n in range(self._connections)]
        await asyncio.gather(*map(self._keep_busy, ports))

    async def _keep_busy(self, port: int) -> None:
        writer: asyncio.StreamWriter | None = None
        for r in self._requests:
            while writer is None:
                if self._stopping.is_set():
                    return
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
            started = time.monotonic()
            with suppress(OSError, EOFError, TimeoutError):  # no answer, or a part of one
                async with asyncio.timeout(40):
                    writer.write(r.raw())
                    r.headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                    length = r.headers.partition("\ncontent-length:")[2].split()[0]
                    r.body = await reader.readexactly(int(length))
                    r.status = int(r.headers.split()[1])
            r.took = time.monotonic() - started
            self.sent.append(r)
            if r.status is None or "\nconnection: close" in r.headers:
                writer.close()
                writer = None
            if self._stopping.is_set():
                break
        if writer:
            writer.close()
