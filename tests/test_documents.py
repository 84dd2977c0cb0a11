"""README and docs: their links lead somewhere, and the tests and files they name exist."""

import re

from dev.local import ROOT


def test_links_files_and_tests_named_in_documents_exist() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "test_api.py", *ROOT.glob("tests/*.py")))
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text = document.read_text()
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        files = re.findall(
            r"`((?:common|transaksi|mutasi|tests|dev|docs)/[\w/.-]+|test_api\.py)", text
        )
        names = re.findall(r"\btest_\w+\b(?!\.py)", text)
        missing = [link for link in links if not (document.parent / link).exists()]
        missing += [file for file in files if not (ROOT / file).exists()]
        missing += [name for name in names if f"def {name}(" not in tests]
        assert missing == [], document.name
