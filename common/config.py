"""Configuration: arguments, and the environment for secrets. Nothing is started here."""

import os
import sys
from argparse import (
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
)
from collections.abc import Callable

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def int_range(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


PORT = int_range(1, 65_535)


class Settings(Namespace):
    """What both services are told by arguments."""

    db_host: str
    db_port: int
    db_name: str
    redis_host: str
    redis_port: int
    log_level: str


def new_parser(service: str, description: str) -> ArgumentParser:
    """Return a parser with the options that both services have."""
    parser = ArgumentParser(
        f"python -m {service}",
        description=description,
        allow_abbrev=False,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--db-host",
        default="127.0.0.1",
        help="PostgreSQL host, or several with commas",
    )
    add("--db-port", default=5432, type=PORT, help="PostgreSQL port")
    add("--db-name", default="tabungan", help="PostgreSQL database")
    add("--redis-host", default="127.0.0.1", help="Redis host")
    add("--redis-port", default=6379, type=PORT, help="Redis port")
    add(
        "--log-level",
        default="INFO",
        type=str.upper,
        choices=LOG_LEVELS,
        help="lowest level",
    )
    return parser


def read_settings(parser: ArgumentParser, settings: Settings) -> None:
    """Parse the arguments into `settings`.

    Exits if one is invalid or a required secret is missing.
    """
    parser.parse_args(namespace=settings)
    for name in ("DB_USER", "DB_PASSWORD"):
        if not os.environ.get(name):
            sys.exit(f"cannot start: the environment variable {name} is missing")
