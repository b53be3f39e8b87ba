# `make help` lists what there is. Everything runs in .venv, which is made on first use.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that is new enough; override with `make venv PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,deepspeed,slurm
ARGS :=

.PHONY: help venv quickstart test test-slow slurm-test slurm-test-all lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

venv: $(STAMP) ## make .venv (again only when pyproject.toml or constraints.txt change)

# constraints.txt pins torch==2.13.0: an unpinned torch may pull gigabytes of CUDA packages where a CPU build is offered.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: install one, or run 'make venv PYTHON=/path/to/python3'." >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)

quickstart: $(STAMP) ## train three methods on the embedded digits, compare them in a report (minutes)
	$(BIN)/python launch/quickstart.py

# A process a core; the tests of one file stay together, for they share what is dear to make.
test: $(STAMP) ## the fast tests; ARGS= goes to pytest
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: $(STAMP) ## the slow tests but for those on SLURM
	$(BIN)/python -m pytest -m "slow and not slurm" $(ARGS)

# Each process has a cluster of its own; which tests it runs on that does not matter.
SLURM_TEST := $(BIN)/python -m pytest tests/slurm --numprocesses 2 --dist worksteal

slurm-test: $(STAMP) ## the fast tests on a real SLURM in this machine; needs root, installs Debian's SLURM
	$(BIN)/python slurm/testbed/testbed.py install
	$(SLURM_TEST) -m "slurm and not slow" $(ARGS)

slurm-test-all: $(STAMP) ## the same, with the slow ones
	$(BIN)/python slurm/testbed/testbed.py install
	$(SLURM_TEST) -m slurm $(ARGS)

lint: $(STAMP) ## style, types and layers; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## every benchmark, quickly; each ends with one line of JSON
	@shopt -s nullglob; for script in benchmarks/[!_]*.py; do \
		echo "== $$script"; $(BIN)/python "$$script" --quick; done

clean: ## remove caches and .venv; runs and shards stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
