"""README and docs: their links lead somewhere, and the tests and files they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TESTS = "\n".join(path.read_text() for path in [ROOT / "test_api.py", *ROOT.glob("tests/*.py")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_files_and_tests_named_in_a_document_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    files = re.findall(r"`((?:common|transaksi|mutasi|tests|dev|docs)/[\w/.-]+|test_api\.py)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    missing += [name for name in re.findall(r"\btest_\w+\b(?!\.py)", text) if f"def {name}(" not in TESTS]
    assert missing == []
