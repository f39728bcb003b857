# Each target sets up what it needs in .venv, and is quick the second time (see .ci/venv).
# PYTHON=/path/to/python chooses the interpreter; by default .ci/pythons finds one.

MAKEFLAGS += --no-print-directory
SHELL = bash
BIN = .venv/bin
export PYTHON
# The version of pyright is pinned in constraints.txt: no hint that a newer one is out.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.PHONY: help demo test lint bench bench-wan bench-backup docs clean
# Two targets at once would install into one environment at the same time.
.NOTPARALLEL:

help:   ## list the targets
	@sed -n 's/^\([a-z-]*\): *## /  make \1\t/p' Makefile | expand -t 20

demo:   ## back up, change, back up again, restore, compare; print what was saved
	@.ci/venv .venv examples
	@$(BIN)/python -m examples.backup.demo

test:   ## every test on every CPython >= 3.11 of this machine; coverage of the core
	@.ci/test

lint:   ## ruff, mypy, pyright, and the layering of the imports
	@.ci/venv .venv examples,lint,test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python -m pytest --quiet tests/test_imports.py

bench:  ## measure against the peers
	@test -f benchmarks/__main__.py || \
		{ echo "make bench: there is no benchmarks/__main__.py, so nothing to run" >&2; exit 1; }
	@.ci/venv .venv bench,examples
	@$(BIN)/python -m benchmarks

bench-wan: ## measure over long links, beside bare TCP and gRPC; needs root
	@.ci/venv .venv bench,examples
	@$(BIN)/python -m benchmarks.wan --install

bench-backup: ## measure the reference backup beside restic and borg; needs root
	@.ci/venv .venv bench,examples
	@$(BIN)/python -m benchmarks.backup --install

docs:   ## build docs/_build/index.html; a warning is an error
	@.ci/venv .venv docs
	$(BIN)/sphinx-build -W --keep-going --quiet -b html docs docs/_build
	@echo "docs/_build/index.html"

clean:  ## remove what the other targets made
	rm -rf .venv .venv-* .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf docs/_build build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
