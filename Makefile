# The README's commands. Each sets up .venv first where it is missing or out of date.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Touched only after the whole installation has succeeded, so that a broken one is done again.
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format fidelity constraints clean

demo: $(INSTALLED)
	$(BIN)/mahlstick demo

# One OpenMP thread a worker: torch would otherwise start a thread for each core in each of them.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

fidelity: $(INSTALLED)
	$(BIN)/python -m benchmarks.fidelity

# Pins what is installed now; run the tests first. The nvidia packages follow from torch's version.
constraints: $(INSTALLED)
	$(BIN)/python -m pip list --format freeze --exclude-editable --exclude pip \
		| grep -vE '^(nvidia-|cuda-|triton)' > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,train]'
	touch $@
