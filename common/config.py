"""Configuration: options from the command line, secrets from the environment."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from common.telemetry import start_logging

log = logging.getLogger(__name__)

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


class Parser(argparse.ArgumentParser):
    """The options of both services. A service adds its own."""

    def __init__(self, service: str, description: str) -> None:
        style = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(
            f"python -m {service}", description=description, formatter_class=style, allow_abbrev=False
        )
        self._service = service
        self.option("--db-host", "127.0.0.1", "PostgreSQL host")
        self.option("--db-port", 5432, "PostgreSQL port", whole(1, 65_535))
        self.option("--db-name", "tabungan", "PostgreSQL database")
        self.option("--redis-host", "127.0.0.1", "Redis host")
        self.option("--redis-port", 6379, "Redis port", whole(1, 65_535))
        self.option("--log-level", "INFO", "least level of log lines", str.upper, choices=LEVELS)

    def option(
        self, name: str, default: object, meaning: str, parse: Callable[[str], object] = str, **more: Any
    ) -> None:
        self.add_argument(name, default=default, help=meaning, type=parse, **more)

    def settings(self) -> argparse.Namespace:
        """Read arguments and environment and start logging. Exits if one is refused or missing.

        `db_user`, `db_password` and `redis_password` ("" for none) come from the environment; `options`
        is a dict of all the others.
        """
        settings = self.parse_args()
        settings.options = dict(vars(settings))
        start_logging(self._service, settings.log_level)
        for name in ("DB_USER", "DB_PASSWORD", "REDIS_PASSWORD"):
            if not os.environ.get(name) and name != "REDIS_PASSWORD":
                log.critical("cannot start: the environment variable %s is missing", name)
                sys.exit(1)
            setattr(settings, name.lower(), os.environ.get(name, ""))
        return settings
