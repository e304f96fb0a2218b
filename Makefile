# Needs make and Python 3.11 or newer; everything else is installed into .venv from the versions in
# constraints.txt. Say PYTHON=/path/to/python to choose the interpreter.

MAKEFLAGS += --no-builtin-rules
unexport PYTHONHOME PYTHONPATH

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
# Two processes; neighbours stay together, so that most fixtures of a file are made once.
TEST_JOBS ?= 2
TEST_ARGS ?=
ROWS ?= 19000000
OUT ?= build/bench
BENCH_ARGS ?=

PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
# setuptools comes from constraints.txt too, so nothing unpinned takes part in the build.
INSTALL := $(PIP_INSTALL) --no-build-isolation --editable

.PHONY: help demo test lint bench venv clean

help:
	@echo 'make demo    install, then build a small mock catalog from end to end (DEMO_ARGS=...)'
	@echo 'make test    install with the test tools, then lint and run all tests (TEST_ARGS=... for pytest)'
	@echo 'make lint    only ruff, mypy and import-linter'
	@echo 'make bench   our steps against what one would use instead (ROWS=2000000 OUT=dir BENCH_ARGS=...)'
	@echo 'make clean   remove the environment, caches and the results of the demo'

demo: $(VENV)/.core
	$(BIN)/sos-dask demo $(DEMO_ARGS)

test: lint
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# STILTS is a Java program: it takes part if it is on the PATH (Debian: stilts).
bench: $(VENV)/.bench
	$(BIN)/python -m tests.bench --rows $(ROWS) --out $(OUT) $(BENCH_ARGS)

venv: $(VENV)/.test

# Stamps: the core alone serves the demo; the test extra contains the core.
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/.python
	@echo 'Installing the pinned dependencies into $(VENV) (1.6 GB, only once) ...'
	@$(PIP_INSTALL) setuptools
	@$(INSTALL) .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo 'Installing the test tools into $(VENV) ...'
	@$(INSTALL) '.[test]'
	@$(BIN)/python -m pip check -q
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@echo 'Installing the programs to compare with into $(VENV) ...'
	@$(INSTALL) '.[test,bench]'
	@touch $@

# A working environment is kept; else a new one is made, with the tested Python first, then newer ones.
SUITS := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
$(VENV)/.python:
	@if $(BIN)/python $(SUITS) && $(BIN)/python -m pip --version >/dev/null 2>&1; then touch $@; exit; fi; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
	    "$$python" $(SUITS) || continue; \
	    if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "$$python cannot make environments: install its venv module (Debian: python3-venv)." >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$("$$python" --version) ..."; \
	    "$$python" -m venv --clear $(VENV) && touch $@; \
	    exit; \
	done; \
	echo 'No Python 3.11 or newer found. Install one, or say: make PYTHON=/path/to/python3.11' >&2; \
	exit 1

clean:
	rm -rf $(VENV) demo-store build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find sos_dask tests -name __pycache__ -type d -prune -exec rm -rf {} +
