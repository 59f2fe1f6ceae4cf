# attnserve: every target sets up what it needs in .venv; nothing has to be activated.
#
#   make serve        vLLM on 127.0.0.1:8000 and the gateway on 127.0.0.1:8080; Ctrl-C stops both
#   make test         the tests of every day (under 30 minutes on 2 cores)
#   make lint         ruff and mypy
#   make install      only the environment
#   make checkpoints  train the reference checkpoints again
#   make analyze      measure what is in checkpoints/ and not measured yet; write docs/RESULTS.md
#   make bench-kernels    time the CPU kernels (ARGS=--quick: under a minute)
#   make gpu-check    the first hour on an NVIDIA GPU, in 8 minutes; needs GPU_PYTHON=
#   make compile-kernels  compile the GPU kernels for GPUs that are not here (ARGS=--quick: a minute)
#   make lock         write requirements/cpu.txt again (UPGRADE=1: newest versions)
#
# Variables: CKPT, BACKEND, VLLM_PORT, GATEWAY_PORT, VLLM_ARGS (serve);
# ARGS (test, analyze, bench-kernels, compile-kernels); PYTHON; TORCH_INDEX, the package index with torch's CPU
# builds, used if pip finds none by itself.

SHELL := /bin/bash
PYTHON ?= python3.11
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' requirements/cpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

CKPT ?= checkpoints/softpick
BACKEND ?=
VLLM_PORT ?= 8000
GATEWAY_PORT ?= 8080
VLLM_ARGS ?=
ARGS ?=
# Python of an environment with CUDA's torch: pip install -e '.[cuda,bench,dev]'. .venv has the CPU's.
GPU_PYTHON ?= python3

PACKAGES := $(wildcard kernels/attn_kernels plugins/vllm_attn plugins/hf_attn serving training quant benchmarks)

export HF_HUB_OFFLINE ?= 1
unexport PYTHONPATH
# The install compiles nothing (that was most of its time): let what is imported be cached.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install serve test test-slow test-gpu lint format checkpoints analyze bench-kernels gpu-check compile-kernels lock clean
.DEFAULT_GOAL := install

install: $(READY)

# --no-compile: what is imported is compiled then, which is a small part of all that is installed.
$(READY): requirements/cpu.txt requirements/vllm-metadata/pyproject.toml pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: the lock is for Python 3.11 and $(PYTHON) is another; use make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) (about three minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-deps --no-compile --quiet $(TORCH) 2>/dev/null \
	  || { echo "PyPI has no CPU build of torch; looking in $(TORCH_INDEX)"; \
	       $(PIP) install --no-deps --no-compile --quiet --index-url $(TORCH_INDEX) $(TORCH); } \
	  || { echo "make: no $(TORCH) there either; name an index that has it: make TORCH_INDEX=URL" >&2; exit 1; }
	$(PIP) install --no-deps --no-compile --quiet -r requirements/cpu.txt
	$(PIP) install --no-deps --no-build-isolation --quiet ./requirements/vllm-metadata
	$(PIP) install --no-deps --no-build-isolation --quiet --editable .
	@touch $@

serve: $(READY)
	@exec $(BIN)/python -m serving.launch --ckpt "$(CKPT)" --backend "$(BACKEND)" \
	  --vllm-port "$(VLLM_PORT)" --gateway-port "$(GATEWAY_PORT)" -- $(VLLM_ARGS)

# Two workers, a file each at a time: most of a test's time is one thread of one vLLM server.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy $(PACKAGES) tools tests

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

checkpoints: $(READY)
	$(BIN)/python -m training.checkpoints $(ARGS)

analyze: $(READY)
	$(BIN)/python -m training.analyze $(wildcard checkpoints/*) $(ARGS)
	$(BIN)/python -m training.report

bench-kernels: $(READY)
	$(BIN)/python -m benchmarks.kernels $(ARGS)

compile-kernels: $(READY)
	$(BIN)/python -m benchmarks.triton_compile $(ARGS)

# Not in .venv, whose torch is for CPUs.
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

lock: $(READY)
	$(BIN)/python tools/lock.py $(if $(UPGRADE),--upgrade)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
