# What a developer runs daily; `make setup` first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test lint bench docs wheel

setup:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]'

test:
	$(BIN)/pytest -n auto --dist loadfile

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/lint_cpp.py

bench:
	$(BIN)/python -m benchmarks

docs:
	$(BIN)/mkdocs build --strict

wheel:
	$(BIN)/pip wheel --no-deps --wheel-dir dist .
