# Each target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# pytest processes; each runs torch on one thread.
WORKERS ?= 2

.PHONY: help demo test lint format golden slow wheel clean

help:
	@echo "make demo    train, evaluate and explain with real weights in a few minutes"
	@echo "make test    linter, formatter, types and the default tests"
	@echo "make lint    linter, formatter and types only"
	@echo "make format  let ruff format and repair what it can"
	@echo "make slow    the tests that take longer"
	@echo "make golden  compare with matrices of the reference code (needs XSIAM_FIXTURES=folder)"
	@echo "make wheel   build the wheel into dist/"
	@echo "make clean   remove caches and builds; environment and runs stay"

# torch goes first: with the pinned version installed, nothing else pulls another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("xsiam needs Python 3.11 or newer; use make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[offline,peft,analysis,dev]"
	touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu"

golden: $(READY)
	@test -n "$(XSIAM_FIXTURES)" || { echo "Set XSIAM_FIXTURES to the folder with the reference matrices."; exit 2; }
	XSIAM_FIXTURES="$(XSIAM_FIXTURES)" $(BIN)/python -m pytest -m golden

wheel: $(READY)
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
