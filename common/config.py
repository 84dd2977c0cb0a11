"""Configuration: options from the command line. Secrets stay in the environment, where nothing logs them."""

import logging
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from common.telemetry import start_logging

log = logging.getLogger(__name__)

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
Option = tuple[str, Any, Callable[[str], Any], str]  # name, default, type, help


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


OPTIONS: Sequence[Option] = (
    ("--db-host", "127.0.0.1", str, "PostgreSQL host"),
    ("--db-port", 5432, whole(1, 65_535), "PostgreSQL port"),
    ("--db-name", "tabungan", str, "PostgreSQL database"),
    ("--redis-host", "127.0.0.1", str, "Redis host"),
    ("--redis-port", 6379, whole(1, 65_535), "Redis port"),
)


def read_settings(service: str, description: str, options: Sequence[Option]) -> Namespace:
    """Read the arguments and start logging. Exits if one is refused, or a secret is missing."""
    parser = ArgumentParser(f"python -m {service}", description=description, allow_abbrev=False)
    parser.formatter_class = ArgumentDefaultsHelpFormatter
    for name, default, parse, meaning in (*OPTIONS, *options):
        parser.add_argument(name, default=default, type=parse, help=meaning)
    parser.add_argument("--log-level", default="INFO", type=str.upper, choices=LEVELS, help="lowest logged")
    settings = parser.parse_args()
    start_logging(service, settings.log_level)
    for name in ("DB_USER", "DB_PASSWORD"):
        if not os.environ.get(name):
            log.critical("cannot start: the environment variable %s is missing", name)
            sys.exit(1)
    return settings
