# Two commands do everything: `make quickstart` and `make test`. Each makes .venv when there is none.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart test check package docs format clean

help:
	@echo "make quickstart   train a small LLaMA with GaLore on Python's own source, about 3 minutes on 2 cores"
	@echo "make test         run the test suite"
	@echo "make check        format, lint and types, as CI does"
	@echo "make package      build wheel and sdist, and try the wheel in an environment with torch alone"
	@echo "make docs         build the documentation into site/"
	@echo "make format       format and fix what can be fixed"
	@echo "make clean        remove .venv, what was built, and caches"

quickstart: .venv/.train
	$(BIN)/subspan train --config recipes/quickstart.yaml --run.out runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

package: .venv/.dev
	rm -rf dist build/package
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m venv build/package
	build/package/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	build/package/bin/subspan --version
	build/package/bin/subspan doctor
	cd build && package/bin/python ../tests/wheel.py

docs: .venv/.docs
	$(BIN)/mkdocs build --strict

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache

.venv/.%: pyproject.toml constraints.txt
	@echo "installing subspan[$*] into .venv: a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable ".[$*]"
	touch $@
