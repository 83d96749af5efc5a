# Needs Python >= 3.11, pip and make. Everything is installed into .venv; nothing outside the checkout is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: setup demo test test-long check lint docs clean

setup: $(VENV)/.ready

# torch first and alone: only this step sees PyTorch's CPU index, so that no CUDA packages are installed.
# --no-deps and one retry keep it short where that index cannot be reached.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mara-deploy: make needs Python >= 3.11, found %d.%d; name another with PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m mara_deploy.demo

test: setup
	$(BIN)/python -m pytest -q -m "not long"

test-long: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -q tests/unit

docs: setup
	$(BIN)/python docs/make_commands.py
	$(BIN)/python docs/make_memory.py

clean:
	rm -rf $(VENV) bundles demo-lm demo-remade build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
