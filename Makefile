# Every target prepares what it needs (scripts/bootstrap.sh), so a fresh clone can start anywhere.

# Options for the command behind a target: make test ARGS='tests/unit -k retry'
ARGS =
# How many test processes run side by side, each with servers of its own; most of the time they wait.
PROCESSES = 4

# Images set it to stay small; here each of the tests' hundreds of processes would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

BIN = .venv/bin
UV = $(BIN)/uv

.DEFAULT_GOAL = help
.PHONY: help setup venv services demo test check bench faults compat lock migration clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: venv services ## prepare everything now: .venv, RabbitMQ, Java and Maven, openssl, libfaketime, promtool

venv:
	@scripts/bootstrap.sh venv

services:
	@scripts/bootstrap.sh services

demo: venv ## the whole story on sample data; nothing to install or configure
	@$(BIN)/orchestrator demo $(ARGS)

test: venv services ## all tests, on real servers
	@$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

check: venv ## format, lint, types, layers, and the environment against pyproject.toml
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(UV) pip check --python $(BIN)/python

# One of them, smaller: make bench BENCHES=day ARGS='--size 1000'
BENCHES = $(sort $(patsubst tests/bench/%.py,%,$(wildcard tests/bench/[a-z]*.py)))

bench: venv services ## measure: every script of tests/bench, one after the other
	@for bench in $(BENCHES); do \
	    echo "== $$bench"; \
	    $(BIN)/python -m "tests.bench.$$bench" $(ARGS) || exit; \
	done

# CI=true: what this machine cannot do fails, for a fault that was skipped proves nothing.
# Fewer at a time: a machine that is busy with something else answers for its own delays.
faults: PROCESSES = 3
faults: venv services ## every fault, many times over, in an hour; without ARGS it writes docs/reliability.md
	@rm -rf build/faults
	@CI=true FAULTS=long FAULT_EVIDENCE=build/faults $(BIN)/python -m pytest tests/faults \
	    tests/integration/test_firing_simulation.py tests/integration/test_life_cycles.py --numprocesses $(PROCESSES) \
	    --dist loadfile --no-loadscope-reorder --timeout=0 $(ARGS); status=$$?; \
	if [ -z "$(ARGS)" ]; then \
	    $(BIN)/python -m tests.support.evidence build/faults > docs/reliability.md || status=1; \
	fi; exit $$status

compat: venv services ## acceptance and a few faults on old and new servers; writes docs/compatibility.md (root, Debian)
	@$(BIN)/python -m scripts.compat $(ARGS)

lock: venv ## resolve requirements.lock anew from pyproject.toml (ARGS=--upgrade: newest versions)
	$(UV) pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --custom-compile-command 'make lock' --quiet --output-file requirements.lock $(ARGS)

migration: venv ## write the next migration from the difference to schema.py: make migration NAME=pauses
	@$(BIN)/python -m scripts.new_migration $(NAME)
	@$(BIN)/ruff check --quiet --fix src/orchestrator/migrations/versions
	@$(BIN)/ruff format --quiet src/orchestrator/migrations/versions

clean: ## remove everything that was made here
	rm -rf .venv .compat .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +
