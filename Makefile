# make test     everything that CI checks: format, lint, types, tests (full-size networks left out)
# make test-all the same, full-size networks included
# make check    format, lint and types only
# make bench    benchmarks at full size; prints the ratios
# make format   rewrite the code the way `make check` wants it
# make clean    remove the environment and every cache
#
# PYTHON       the interpreter that .venv is made from, 3.11 or newer
# VENV         where the environment is kept
# TORCH_INDEX  a package index to ask for torch, too. On Linux the default index has PyTorch with CUDA;
#              TORCH_INDEX=https://download.pytorch.org/whl/cpu has the much smaller CPU build.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: test test-all check bench format clean
.DELETE_ON_ERROR:

test: check
	$(BIN)/python -m pytest -m "not slow"

test-all: check
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest tests/benchmarks -s --full-size

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and by itself, so that TORCH_INDEX serves torch (and what it needs) and nothing else; it also brings the
# setuptools that builds gigasr, hence no build isolation. The stamp comes last: a broken install is tried again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gigasr needs Python 3.11 or newer, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1 | tail -n 1)" >&2; \
	  echo "hint: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find stablesr tests -name __pycache__ -type d -prune -exec rm -rf {} +
