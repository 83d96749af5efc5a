# Needs Python >= 3.11, pip and make. Everything is installed into .venv; nothing outside the checkout is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Workers have an equal share of the cores each (tests/conftest.py). A file's tests share fixtures: they stay together.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations 20

.PHONY: setup demo test test-long test-lowest test-transformers5 test-eval test-clients check lint docs clean

setup: $(VENV)/.ready

# torch first and alone: only this step sees PyTorch's CPU index, so that no CUDA packages are installed.
# --no-deps and one retry keep it short where that index cannot be reached.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mara-deploy: make needs Python >= 3.11, found %d.%d; name another with PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

# NVIDIA's Python packages of the releases that we support, each in a folder of its own and without its libraries:
# tests/tensorrt/test_api_names.py reads their names. There are none for other machines, and of the old ones none for a
# new Python: those lines may fail.
$(VENV)/.names: $(VENV)/.ready
ifeq ($(shell uname -sm),Linux x86_64)
	-$(PIP) install --no-deps --upgrade --target $(VENV)/tensorrt-10.3 tensorrt-cu12-bindings==10.3.0
	-$(PIP) install --no-deps --upgrade --target $(VENV)/tensorrt-10.13 tensorrt-cu12-bindings==10.13.3.9
	-$(PIP) install --no-deps --upgrade --target $(VENV)/tensorrt-10.16 tensorrt-cu13-bindings==10.16.1.11
	$(PIP) install --no-deps --upgrade --target $(VENV)/tensorrt-11.4 tensorrt-cu13-bindings==11.4.0.106
	$(PIP) install --no-deps --upgrade --target $(VENV)/cuda-bindings-12.9 cuda-bindings==12.9.10
endif
	touch $@

# ONNX Runtime's CUDA build (255 MB) and NVIDIA's headers, in folders of their own: tests/cuda runs it without a GPU, on
# stand-ins of the CUDA libraries that it compiles with g++.
$(VENV)/.cuda: $(VENV)/.ready
ifeq ($(shell uname -sm),Linux x86_64)
	$(PIP) install --no-deps --upgrade --target $(VENV)/onnxruntime-gpu onnxruntime-gpu==1.31.1
	$(PIP) install --no-deps --upgrade --target $(VENV)/cuda-headers nvidia-cuda-runtime==13.5.37 nvidia-cuda-crt==13.5.37
endif
	touch $@

demo: setup
	$(BIN)/python -m mara_deploy.demo

test: setup
	$(PYTEST) -m "not long"

test-long: setup $(VENV)/.names $(VENV)/.cuda
	$(PYTEST)

# The runtime at the lowest versions that pyproject.toml permits, in an environment of its own; LOWEST=python3.10 names
# another interpreter for it.
test-lowest: setup
	$(BIN)/python tests/lowest.py $(LOWEST)

# Export and training with transformers 5, in an environment of its own.
test-transformers5: setup
	$(BIN)/python tests/transformers5.py -n $(WORKERS) --dist loadfile

# Bundles as a model of lm-eval, in an environment of its own.
test-eval: setup
	$(BIN)/python -m tests.eval

# LangChain's client, and requests that schemathesis makes of the OpenAPI document, in an environment of their own.
test-clients: setup
	$(BIN)/python -m tests.serve

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Before a commit: lint, types, and the quick ones of the tests that need no PyTorch.
check: lint
	$(PYTEST) -m "not long and not slow" tests/unit

docs: setup
	$(BIN)/python docs/make_commands.py
	$(BIN)/python docs/make_memory.py

clean:
	rm -rf $(VENV) bundles demo-lm demo-remade build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
