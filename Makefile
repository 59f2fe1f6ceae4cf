# attnserve: every target sets up what it needs in .venv; nothing has to be activated.
#
#   make serve        vLLM on 127.0.0.1:8000 and the gateway on 127.0.0.1:8080; Ctrl-C stops both
#   make test         the tests of every day (under 30 minutes on 2 cores)
#   make lint         ruff and mypy
#   make install      only the environment
#   make checkpoints  train the reference checkpoints again
#   make lock         write requirements/cpu.txt again (UPGRADE=1: newest versions)
#
# Variables: CKPT, BACKEND, VLLM_PORT, GATEWAY_PORT, VLLM_ARGS (serve); ARGS (test); PYTHON;
# TORCH_INDEX, a package index that has torch's CPU build, where pip does not know one already.

SHELL := /bin/bash
PYTHON ?= python3.11
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

CKPT ?= checkpoints/softpick
BACKEND ?=
VLLM_PORT ?= 8000
GATEWAY_PORT ?= 8080
VLLM_ARGS ?=
ARGS ?=

PACKAGES := $(wildcard kernels/attn_kernels plugins/vllm_attn plugins/hf_attn serving training)

export HF_HUB_OFFLINE ?= 1
unexport PYTHONPATH

.PHONY: install serve test test-slow test-gpu lint format checkpoints lock clean
.DEFAULT_GOAL := install

install: $(READY)

$(READY): requirements/cpu.txt requirements/vllm-metadata/pyproject.toml pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: the lock is for Python 3.11 and $(PYTHON) is another; use make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) (about three minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-deps --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/cpu.txt \
	  || { echo "make: the install failed, see above. If torch's +cpu build was not found: make TORCH_INDEX=https://download.pytorch.org/whl/cpu" >&2; exit 1; }
	$(PIP) install --no-deps --no-build-isolation --quiet ./requirements/vllm-metadata
	$(PIP) install --no-deps --no-build-isolation --quiet --editable .
	@touch $@

serve: $(READY)
	@exec $(BIN)/python -m serving.launch --ckpt "$(CKPT)" --backend "$(BACKEND)" \
	  --vllm-port "$(VLLM_PORT)" --gateway-port "$(GATEWAY_PORT)" -- $(VLLM_ARGS)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy $(PACKAGES) tools

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

checkpoints: $(READY)
	$(BIN)/python -m training.checkpoints $(ARGS)

lock: $(READY)
	$(BIN)/python tools/lock.py $(if $(UPGRADE),--upgrade)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
