# `make demo` and `make test` are all that a fresh machine needs: the first of them makes the environment.
# Settings: PYTHON (3.10 or newer), VENV, ARGS (for pytest, or for the demo), and for `make bench` BENCH_ARGS.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-slow check format bench bench-plans clean

help:
	@echo "make demo       run a model card on a memory budget, from an embedded Hub"
	@echo "make test       the fast tests (ARGS='-k name' to choose)"
	@echo "make test-slow  those that take minutes or gigabytes"
	@echo "make check      ruff, mypy and import-linter"
	@echo "make format     let ruff rewrite what it can"
	@echo "make bench      the engine's targets in one table (10 GB of disk, minutes; BENCH_ARGS='--model llama_1b_tiny': seconds)"
	@echo "make bench-plans  what plans promise, held against what happens (15 GB of disk; PLANS_ARGS='--tiny': a minute)"
	@echo "make clean      remove caches and the benchmarks' checkpoints; the environment stays"

install: $(STAMP)

# torch by its pinned version first: asked for by a range, pip may prefer a build with gigabytes for an accelerator.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name it: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)
	$(BIN)/python examples/image_demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -rs $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -rs -m slow $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# Every target of the engine in one table; benchmarks/README.md says more. Memory limits and a cold cache need root.
# BENCH_ARGS="--model llama_1b_tiny" for the logic alone, "--case disk_bound" for one row.
BENCH_ARGS ?= --record benchmarks/RESULTS.md

bench: $(STAMP)
	$(BIN)/python -m benchmarks.streaming $(BENCH_ARGS)

# What plans promise, held against what happens (15 GB of disk). PLANS_ARGS="--tiny" for the logic alone.
PLANS_ARGS ?= --record benchmarks/RESULTS.md

bench-plans: $(STAMP)
	$(BIN)/python -m benchmarks.planning $(PLANS_ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
