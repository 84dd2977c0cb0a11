"""Schemathesis asks the service all that its own /openapi.json allows, and much that it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PIN, Database

CONFIG = """
[checks.positive_data_acceptance]  # what is well-formed may still be against the rules, or use a key again
expected-statuses = ["2xx", "400", "422"]
[dictionaries]
own = {{ values = ["{no_rekening}"] }}
[parameters]
"body.no_rekening" = {{ dictionary = "own", probability = 0.7 }}
"""


@pytest.mark.parametrize("examples", [150, pytest.param(5000, marks=pytest.mark.long)])
def test_every_answer_to_whatever_comes_is_documented(
    url: str, database: Database, tmp_path: Path, examples: int
) -> None:
    no_rekening = database.open_account(10**9)
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(no_rekening=no_rekening))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json"]
    options = ["--checks", "all", "--auth", f"{no_rekening}:{PIN}", "--max-examples", str(examples)]
    done = subprocess.run(
        [*command, *options, "--generation-database", "none", "--no-color"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Not all of it was turned away at the door: money has moved, and adds up.
    assert len(database("SELECT 1 FROM transaksi WHERE no_rekening = %s", no_rekening)) > examples / 10
    database.audit()
