# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-browser lint stop clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / \t/'

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"got Python {sys.version.split()[0]}, expected 3.11 or newer; set PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	touch $@

demo: $(VENV)/.installed  ## align SmolLM2-135M on the small data varflow ships; leaves the servers up
	$(BIN)/varflow up
	$(BIN)/varflow run demo

stop:  ## stop the servers that `make demo` left up
	$(BIN)/varflow down

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint  ## the tests of the fast tier
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev  ## tests that need minutes or the embedded models
	$(BIN)/python -m pytest -m slow

test-browser: $(VENV)/.installed-browser  ## tests in a real Chromium (Debian: apt-get install chromium)
	$(BIN)/python -m pytest -m browser

clean:  ## remove the environment and all local state
	-$(BIN)/varflow down
	rm -rf $(VENV) .varflow
