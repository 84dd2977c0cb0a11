# Needs Python 3.11 or newer with pip 22.3 or newer, and make. PostgreSQL and a Redis-compatible
# server come with the packages. The environment without uv, by pip alone, which takes longer:
#   python3 -m venv .venv && .venv/bin/pip install --require-hashes -r requirements-dev.txt && touch .venv/ready
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/ready
UV = $(or $(shell command -v uv 2>/dev/null),$(BIN)/uv)
INSTALL = $(UV) pip install --quiet --python .venv --require-hashes
COMPILE = $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q -U

help:            ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

run: $(READY)    ## start both services without Docker, on port 8000; Ctrl-C stops everything
	@$(BIN)/python -m dev.local

test: $(READY)   ## all tests but the long ones
	$(BIN)/pytest -m "not long"

test-quick: $(READY)  ## the four scenarios and the HTTP contract, against API_URL if that is set
	$(BIN)/pytest test_api.py

test-long: $(READY)  ## the tests that take longer
	$(BIN)/pytest -m long

bench: $(READY)  ## measure
	$(BIN)/python -m dev.bench

lint: $(READY)   ## formatting, style, types, kubernetes.yaml, and the compose file where Docker is there
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/kubernetes-validate --strict --quiet -k 1.37 kubernetes.yaml
	@if docker compose version >/dev/null 2>&1; then docker compose config -q; fi

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(READY)   ## pin the newest allowed versions of everything, with hashes
	$(COMPILE) pyproject.toml -o requirements.txt
	@echo "-r requirements.txt" > requirements-dev.txt
	$(COMPILE) --group dev -c requirements.txt $$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements.txt) \
		>> requirements-dev.txt

# uv installs the packages. Where it is not on the PATH, pip brings the version pinned here.
$(READY): requirements.txt requirements-dev.txt
	@echo "Installing the packages of requirements-dev.txt into .venv (only the first time)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.13 ...")'
	@$(PYTHON) -m venv --clear --without-pip .venv
	@sed -n '/^uv==/,/[^\\]$$/p' requirements-dev.txt > .venv/uv.txt
	@test $(UV) != $(BIN)/uv || $(PYTHON) -m pip --python .venv install -q --disable-pip-version-check --require-hashes -r .venv/uv.txt
	@$(INSTALL) -r requirements-dev.txt
	@touch $@

.PHONY: help run test test-quick test-long bench lint format lock
