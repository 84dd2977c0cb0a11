"""What both services are told: arguments, and secrets from the environment."""

import argparse
import gc
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from telemetry import give_up, start_logging

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class Settings(argparse.Namespace):
    """What both services are told: arguments, and from the environment the secrets."""

    db_host: str
    db_port: int
    db_name: str
    redis_host: str
    redis_port: int
    log_level: str
    db_user: str
    db_password: str
    redis_password: str | None

    def shown(self) -> dict[str, object]:
        """The settings without the secrets."""
        return {name: value for name, value in vars(self).items() if not name.endswith(("user", "password"))}


S = TypeVar("S", bound=Settings)


class Parser(argparse.ArgumentParser):
    """The arguments both services have; a service adds its own with `option`."""

    def __init__(self, service: str, description: str) -> None:
        super().__init__(prog=f"python -m {service}", description=description, allow_abbrev=False)
        self._service = service
        self.option("--db-host", str, "127.0.0.1", "PostgreSQL host")
        self.option("--db-port", whole(1, 65535), 5432, "PostgreSQL port")
        self.option("--db-name", str, "tabungan", "PostgreSQL database")
        self.option("--redis-host", str, "127.0.0.1", "Redis host")
        self.option("--redis-port", whole(1, 65535), 6379, "Redis port")
        self.option("--log-level", str.upper, "INFO", ", ".join(LEVELS), choices=LEVELS)

    def option(
        self,
        name: str,
        kind: Callable[[str], object],
        default: object,
        meaning: str,
        choices: Sequence[str] | None = None,
    ) -> None:
        text = f"{meaning} (default: {default})"
        self.add_argument(name, type=kind, default=default, choices=choices, metavar="X", help=text)

    def settings(self, into: S) -> S:
        """Read arguments and environment and start logging; exits where one is missing or refused."""
        self.parse_args(namespace=into)
        start_logging(self._service, into.log_level)
        for name in ("DB_USER", "DB_PASSWORD"):
            if not os.environ.get(name):
                give_up(f"cannot start: the environment variable {name} is missing")
        into.db_user = os.environ["DB_USER"]
        into.db_password = os.environ["DB_PASSWORD"]
        into.redis_password = os.environ.get("REDIS_PASSWORD") or None
        return into


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def spare_gc() -> None:
    """Keep the garbage collector from reading all modules and what is in flight again and again.

    Measured: a quarter of the CPU of a request. https://docs.python.org/3/library/gc.html#gc.freeze
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
