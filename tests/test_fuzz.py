"""Schemathesis sends what /openapi.json allows, and much that it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PIN, Database

CONFIG = """
[generation]
allow-extra-parameters = false  # an unknown query parameter is ignored
[checks.positive_data_acceptance]  # a well-formed request may be against the rules, or reuse a key
expected-statuses = ["2xx", "400", "422"]
[dictionaries]
own = {{ values = ["{no_rekening}"] }}
[parameters]
"body.no_rekening" = {{ dictionary = "own", probability = 0.7 }}
"""


@pytest.mark.long
def test_answer_to_any_request_is_documented(url: str, database: Database, tmp_path: Path) -> None:
    no_rekening = database.open_account(10**9)
    (tmp_path / "schemathesis.toml").write_text(CONFIG.format(no_rekening=no_rekening))
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--auth", f"{no_rekening}:{PIN}", "--max-examples", "300", "--workers", "8", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Not all was refused: money has moved, and adds up.
    moved = "SELECT count(*) FROM transaksi WHERE no_rekening = %s"
    assert database(moved, no_rekening)[0][0] > 30
    database.audit()
