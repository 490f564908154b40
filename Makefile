# make demo     upscale a photograph with the embedded network, into the folder gigasr-demo
# make test     everything that CI checks: format, lint, types, tests (full-size networks left out)
# make test-all the same, full-size networks included
# make check    format, lint and types only
# make bench    benchmarks at full size; prints the ratios
# make format   rewrite the code the way `make check` wants it
# make clean    remove the environment and every cache
#
# PYTHON       the interpreter that .venv is made from, 3.11 or newer
# VENV         where the environment is kept
# TORCH_INDEX  a package index to ask for torch, besides the usual ones; empty for none. The usual one has PyTorch with
#              CUDA for Linux, gigabytes of it; so on Linux without a GPU this is that of the CPU builds, if it answers.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= auto

CPU_BUILDS := https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# In two processes with one thread of PyTorch each: threads that have no core to themselves mostly wait for each other.
# Clusters that lose machines, and benchmarks, have the machine for themselves.
IN_TWO := --numprocesses 2 --dist loadfile --ignore tests/ray --ignore tests/benchmarks
BY_THEMSELVES := tests/ray tests/benchmarks
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Stamps of what the environment has. They come last: a broken install is tried again.
TORCH := $(VENV)/.torch
FOR_DEMO := $(VENV)/.demo
READY := $(VENV)/.ready

.PHONY: demo test test-all check bench format clean
.DELETE_ON_ERROR:

demo: $(if $(wildcard $(READY)),$(READY),$(FOR_DEMO))
	$(BIN)/gigasr demo gigasr-demo

test: check
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" $(IN_TWO)
	$(PYTEST) -m "not slow" $(BY_THEMSELVES)

test-all: check
	OMP_NUM_THREADS=1 $(PYTEST) $(IN_TWO)
	$(PYTEST) $(BY_THEMSELVES)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest tests/benchmarks -s --full-size

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml $(TORCH)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@touch $@

$(FOR_DEMO): pyproject.toml $(TORCH)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[demo]'
	@touch $@

# torch first and by itself, so that TORCH_INDEX serves torch (and what it needs) and nothing else; with it the
# setuptools that builds gigasr, hence no build isolation. An index that is not there costs pip minutes, so it is asked
# before, once and briefly.
$(TORCH): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gigasr needs Python 3.11 or newer, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1 | tail -n 1)" >&2; \
	  echo "hint: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@index='$(TORCH_INDEX)'; \
	if [ "$$index" = auto ]; then \
	  index=; \
	  if [ "$$(uname -s)" = Linux ] && [ ! -e /dev/nvidia0 ] && ! command -v nvidia-smi >/dev/null; then \
	    $(PYTHON) -c 'import sys, urllib.request as web; web.urlopen(sys.argv[1], timeout=5)' $(CPU_BUILDS)/torch/ \
	      2>/dev/null && index=$(CPU_BUILDS); \
	  fi; \
	fi; \
	echo "installing PyTorch from $${index:-the usual index}"; \
	$(PIP) install --quiet -c constraints.txt $${index:+--extra-index-url "$$index"} torch setuptools
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache gigasr-demo
	find stablesr pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
