# Everything sets itself up: a virtual environment of its own, pinned by constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint types format wheel clean

demo: $(READY)  ## the main job on the bundled model, offline
	$(BIN)/bitstrata demo

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest -q

check: lint types  ## what must be clean before a commit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)  ## build dist/bitstrata-*.whl
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
