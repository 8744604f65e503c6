# Two commands do everything: `make quickstart` and `make test`. Each makes .venv when there is none.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart test check format clean

help:
	@echo "make quickstart   train a small LLaMA with GaLore on Python's own source, about 3 minutes on 2 cores"
	@echo "make test         run the test suite"
	@echo "make check        format, lint and types, as CI does"
	@echo "make format       format and fix what can be fixed"
	@echo "make clean        remove .venv and caches"

quickstart: .venv/.train
	$(BIN)/subspan train --config recipes/quickstart.yaml --run.out runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

.venv/.%: pyproject.toml constraints.txt
	@echo "installing subspan[$*] into .venv: a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable ".[$*]"
	touch $@
