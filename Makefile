# `make demo`, `make test` and `make check` set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench format clean

# Made again when the project's requirements change.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv: .venv/installed

demo: .venv/installed
	$(BIN)/trueward demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

# Side by side with TRL: make bench DATA=folder-of-preference-sets. Hours; docs/performance.md.
bench: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,trl]'
	$(BIN)/python benchmarks/run.py $(if $(DATA),--data_dir $(DATA))

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache runs
