# Everything needs only Python 3.11+, pip and make: PostgreSQL and a Redis-compatible server come with the packages.
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/ready

help:            ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

run: $(READY)    ## start both services without Docker, on port 8000; Ctrl-C stops everything
	@$(BIN)/python -m dev.local

test: $(READY)   ## all tests, under 5 minutes
	$(BIN)/pytest -m "not long"

test-quick: $(READY)  ## the four scenarios and the HTTP contract, in seconds
	$(BIN)/pytest test_api.py

test-long: $(READY)   ## the tests that take longer
	$(BIN)/pytest -m long

bench: $(READY)  ## measure; under 10 minutes
	$(BIN)/python -m dev.bench

lint: $(READY)   ## formatting, style, types, and the compose file where Docker is there
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	@if docker compose version >/dev/null 2>&1; then docker compose config -q; fi

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(READY)   ## pin the newest allowed versions of everything, with hashes
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header -q -U pyproject.toml -o requirements.txt
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header -q -U pyproject.toml --group dev -c requirements.txt -o requirements-dev.txt

$(READY): requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

.PHONY: help run test test-quick test-long bench lint format lock
