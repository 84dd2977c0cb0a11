"""Configuration: options from the command line, secrets from the environment."""

import logging
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from common.telemetry import start_logging

log = logging.getLogger(__name__)

Option = tuple[str, Any, Callable[[str], Any], str]  # name, default, type, help


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def level(text: str) -> str:
    """An argparse type: the name of a log level."""
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ArgumentTypeError(f"{text!r} is not a log level")
    return text.upper()


OPTIONS: Sequence[Option] = (
    ("--db-host", "127.0.0.1", str, "PostgreSQL host"),
    ("--db-port", 5432, whole(1, 65_535), "PostgreSQL port"),
    ("--db-name", "tabungan", str, "PostgreSQL database"),
    ("--redis-host", "127.0.0.1", str, "Redis host"),
    ("--redis-port", 6379, whole(1, 65_535), "Redis port"),
    ("--log-level", "INFO", level, "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
)


def read_settings(service: str, description: str, options: Sequence[Option]) -> Namespace:
    """Read arguments and environment and start logging. Exits if one is refused or missing.

    `options` of the result is a dict of all but the secrets: `db_user`, `db_password`, `redis_password`.
    """
    style = ArgumentDefaultsHelpFormatter
    parser = ArgumentParser(
        f"python -m {service}", None, description, formatter_class=style, allow_abbrev=False
    )
    for name, default, parse, meaning in (*OPTIONS, *options):
        parser.add_argument(name, default=default, type=parse, help=meaning)
    settings = parser.parse_args()
    settings.options = dict(vars(settings))
    start_logging(service, settings.log_level)
    for name in ("DB_USER", "DB_PASSWORD", "REDIS_PASSWORD"):
        if not os.environ.get(name) and name != "REDIS_PASSWORD":
            log.critical("cannot start: the environment variable %s is missing", name)
            sys.exit(1)
        setattr(settings, name.lower(), os.environ.get(name) or None)
    return settings
