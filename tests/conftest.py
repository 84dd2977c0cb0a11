"""A bank whose parts a test may break."""

import re
import resource
from collections.abc import Iterator

import pytest

from tests.load import Bank
from tests.support import new_servers


@pytest.fixture(scope="session")
def shared_bank() -> Iterator[Bank]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))  # for 1,250 connections
    with new_servers() as servers:
        yield (bank := Bank(servers))
        assert {service.stop(timeout=8) for service in bank.services} == {0}
        assert not re.search("deadlock detected|duplicate key", servers.postgres.log.read_text())


@pytest.fixture
def bank(shared_bank: Bank) -> Iterator[Bank]:
    """The bank in order, which is checked after the test."""
    shared_bank.loads.clear()
    shared_bank.repair()
    shared_bank.sql.audit()
    shared_bank.stream.flushall()
    for service in shared_bank.services:
        service.log.touch()
        service.log_start = service.log.stat().st_size  # `log_lines` begins here
    yield shared_bank
    shared_bank.check()
