"""Configuration: options from the command line, secrets from the environment."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from common.telemetry import start_logging

log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S", bound="Settings")


def option(default: T, parse: Callable[[str], T], meaning: str, **more: Any) -> T:
    """Declare a field of `Settings` that is a command line option; `more` is argparse's."""
    declared: T = field(default=default, metadata={"type": parse, "help": meaning} | more)
    return declared


def whole(low: int, high: int) -> Callable[[str], int]:
    """Parse a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both services are configured with. A service adds its own options in a subclass."""

    db_host: str = option("127.0.0.1", str, "PostgreSQL host")
    db_port: int = option(5432, whole(1, 65_535), "PostgreSQL port")
    db_name: str = option("tabungan", str, "PostgreSQL database")
    redis_host: str = option("127.0.0.1", str, "Redis host")
    redis_port: int = option(6379, whole(1, 65_535), "Redis port")
    log_level: str = option(
        "INFO",
        str.upper,
        "DEBUG, INFO, WARNING, ERROR or CRITICAL",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    )
    db_user: str
    db_password: str = field(repr=False)
    redis_password: str = field(repr=False)

    def options(self) -> dict[str, object]:
        """The settings without the secrets."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata}


def read_settings(cls: type[S], service: str, description: str) -> S:
    """Read arguments and environment and start logging. Exits if one is refused or missing."""
    parser = argparse.ArgumentParser(f"python -m {service}", None, description, allow_abbrev=False)
    for f in fields(cls):
        if f.metadata:
            known = {**f.metadata, "help": f"{f.metadata['help']} (default: {f.default})"}
            parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, metavar="X", **known)
    values: dict[str, Any] = vars(parser.parse_args())
    start_logging(service, values["log_level"])
    for name in ("DB_USER", "DB_PASSWORD", "REDIS_PASSWORD"):
        values[name.lower()] = os.environ.get(name, "")
        if not values[name.lower()] and name != "REDIS_PASSWORD":
            log.critical("cannot start: the environment variable %s is missing", name)
            sys.exit(1)
    return cls(**values)
