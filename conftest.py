"""Fixtures: services on servers of our own, or with API_URL a running deployment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

API_URL = os.environ.get("API_URL")
if not API_URL:
    from tests.support import Customer, new_servers, running

if TYPE_CHECKING:
    from tests.support import Database, Servers


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    if API_URL:
        pytest.skip("needs SQL and the stream, but API_URL is set")
    with new_servers() as started:
        yield started


@pytest.fixture(scope="session")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the API answers: API_URL, or services on the session's servers."""
    if API_URL:
        yield API_URL
        return
    servers: Servers = request.getfixturevalue("servers")
    options = ("--max-pin-failures", "1000000", "--resend-after", "1")
    transaksi = servers.service("transaksi", *options)
    with running(transaksi, servers.service("mutasi")):
        yield transaksi.url


@pytest.fixture
def database(servers: Servers, url: str) -> Database:  # noqa: ARG001 - starts the services
    """SQL on the database behind `url`."""
    return servers.database


@pytest.fixture
def customer() -> Iterator[Callable[..., Customer]]:
    """Makes customers, `customer(url, no_rekening, pin)`, and closes their connections."""
    with ExitStack() as stack:
        yield lambda *parts: stack.enter_context(closing(Customer(*parts)))
