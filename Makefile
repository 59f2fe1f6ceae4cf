# attnserve: every target sets up what it needs in .venv; nothing has to be activated.
#
#   make serve        vLLM on 127.0.0.1:8000 and the gateway on 127.0.0.1:8080; Ctrl-C stops both
#   make test-fast    those that start no vLLM server (5 minutes on 2 cores)
#   make test         the tests of every day (under 30 minutes on 2 cores)
#   make test-slow    the tests that take longer than a minute each
#   make test-gpu     the tests that need a GPU; needs GPU_PYTHON=
#   make lint         ruff, mypy and clang-format
#   make format       ruff: mend what it can, lay out the code; clang-format: lay out the C++
#   make conformance  suites of others (openai-python's tests, llm-comply, schemathesis) against the gateway
#   make sanitize     the CPU kernels under AddressSanitizer, on random and on bad arguments
#   make soak         the gateway under 1000 streams for 5 minutes
#   make install      only the environment
#   make checkpoints  train the reference checkpoints again
#   make analyze      measure what is in checkpoints/ and not measured yet; write docs/RESULTS.md
#   make bench        the standard benchmarks on the bundled checkpoints, in under 40 minutes on 2 cores
#                     (ARGS="--only serve memory": some of kernels, memory, serve, pruning, gateway)
#   make bench-kernels    time the CPU kernels (ARGS=--quick: under a minute)
#   make gpu-check    what a GPU must show, in 15 minutes: tests, tuning, times, serving; needs GPU_PYTHON=
#                     (ARGS=--dry: tiny, without a GPU; --only correctness tune: some of it)
#   make compile-kernels  compile the GPU kernels for GPUs that are not here (ARGS=--quick: a minute)
#   make doctor       what is wrong with this environment, and what to do; before an install, too
#   make images-check check docker/ and deploy/ with hadolint, docker compose, kubernetes-validate
#   make lock         write requirements/*.txt again (UPGRADE=1: newest versions)
#   make clean        remove .venv and what the tools keep
#
# Variables: CKPT, BACKEND, VLLM_PORT, GATEWAY_PORT, VLLM_ARGS (serve);
# ARGS (doctor, test, conformance, sanitize, soak, analyze, bench, bench-kernels, compile-kernels); PYTHON;
# TORCH_INDEX, the package index with torch's CPU builds, used if pip finds none by itself.

SHELL := /bin/bash
PYTHON ?= python3.11
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKERS := .venv-images

CKPT ?= checkpoints/softpick
BACKEND ?=
VLLM_PORT ?= 8000
GATEWAY_PORT ?= 8080
VLLM_ARGS ?=
ARGS ?=
# Python of an environment with CUDA's torch: pip install -e '.[cuda,bench,dev]'. .venv has the CPU's.
GPU_PYTHON ?= python3

PACKAGES := $(wildcard attnserve kernels/attn_kernels kernels/quant_kernels plugins/vllm_attn plugins/vllm_quant plugins/hf_attn serving training quant benchmarks)
CPP = $(shell git ls-files '*.cpp' '*.hpp')

export HF_HUB_OFFLINE ?= 1
unexport PYTHONPATH
# The install compiles nothing (that was most of its time): let what is imported be cached.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install serve test-fast test test-slow test-gpu conformance sanitize soak lint format checkpoints analyze bench bench-kernels gpu-check compile-kernels doctor images-check lock clean
.DEFAULT_GOAL := install

install: $(READY)

$(READY): requirements/cpu.txt requirements/vllm-metadata/pyproject.toml pyproject.toml tools/install.sh
	@echo "Setting up $(VENV): 1 GB to download, 3 to 5 minutes the first time"
	@export INSTALL_BEGAN=$$(date +%s) PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)"; \
	tools/install.sh dependencies $(VENV) requirements/cpu.txt && \
	tools/install.sh project $(VENV) --editable
	@touch $@

serve: $(READY)
	@exec $(BIN)/python -m attnserve serve "$(CKPT)" --backend "$(BACKEND)" \
	  --vllm-port "$(VLLM_PORT)" --gateway-port "$(GATEWAY_PORT)" -- $(VLLM_ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not integration" $(ARGS)

# Two workers, a file each at a time: most of a test's time is one thread of one vLLM server.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu:
	TRITON_INTERPRET=0 $(GPU_PYTHON) -m pytest -m gpu $(ARGS)

# In an environment of their own: nothing here depends on them, and their needs change with them.
SUITES := tests/conformance/.venv
$(SUITES)/.ready: requirements/conformance.txt
	$(PYTHON) -m venv $(SUITES)
	$(SUITES)/bin/python -m pip --disable-pip-version-check install --no-deps --quiet -r requirements/conformance.txt
	rm -rf $(SUITES)/openai-*
	$(SUITES)/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --no-build-isolation \
	  --no-binary openai --dest $(SUITES) $$(grep '^openai==' requirements/conformance.txt)
	tar -xzf $(SUITES)/openai-*.tar.gz -C $(SUITES)
	@touch $@

conformance: $(READY) $(SUITES)/.ready
	$(BIN)/python -m tests.conformance $(ARGS)

# Leaks are not looked for: most are Python's. env: the compiler is not to be sanitized itself. Checks
# that are calls compile in seconds, those in place in minutes.
SANITIZED := env -u LD_PRELOAD g++ -fsanitize=address -g1 --param asan-instrumentation-with-call-threshold=0
sanitize: $(READY)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 CXX="$(SANITIZED)" \
	$(BIN)/python -m pytest -n 0 -k "not instruction_sets and not compiled_graphs" \
	  tests/attn_kernels/test_arguments.py tests/attn_kernels/test_pruned_layers.py \
	  tests/attn_kernels/test_kv_quant.py \
	  $(addprefix tests/attn_kernels/test_paged.py::test_,quantized_caches_equal_reference \
	  threads_write_and_read_a_quantized_cache) tests/quant_kernels/test_packed.py $(ARGS)

# Not in test-slow, which would be longer by it: two cores are busy for all of its minutes.
soak: $(READY)
	$(BIN)/python -m tests.serving.soak $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy $(PACKAGES) tools tests
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(CPP)

checkpoints: $(READY)
	$(BIN)/python -m training.checkpoints $(ARGS)

analyze: $(READY)
	$(BIN)/python -m training.analyze $(wildcard checkpoints/*) $(ARGS)
	$(BIN)/python -m training.report

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

bench-kernels: $(READY)
	$(BIN)/python -m benchmarks.kernels $(ARGS)

compile-kernels: $(READY)
	$(BIN)/python -m benchmarks.triton_compile $(ARGS)

# Not in .venv, whose torch is for CPUs.
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

# Also where nothing is installed yet, or not wholly: then with any Python, and for what it can tell.
doctor:
	@if $(BIN)/python -c 'import attnserve.cli' 2>/dev/null; then \
	  exec $(BIN)/python -m attnserve doctor $(ARGS); \
	fi; \
	for python in "$(PYTHON)" python3 python; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then \
	    exec "$$python" -m serving.launch.host_checks "$(VENV)" --python "$(PYTHON)" $(ARGS); \
	  fi; \
	done; \
	echo "doctor: there is no Python 3: install Python 3.11 (Debian: apt install python3.11-venv)" >&2; \
	exit 1

# The checkers are programs of their own, so they get an environment of their own.
images-check: $(READY) $(CHECKERS)/.ready
	PATH="$(CURDIR)/$(CHECKERS)/bin:$$PATH" $(BIN)/python -m pytest -m "not slow" tests/test_images.py $(ARGS)

$(CHECKERS)/.ready: requirements/images-check.txt
	$(PYTHON) -m venv $(CHECKERS)
	$(CHECKERS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet -r requirements/images-check.txt
	@touch $@

lock: $(READY)
	PATH="$(BIN):$$PATH" tools/lock.sh $(if $(UPGRADE),--upgrade)

clean:
	rm -rf $(VENV) $(SUITES) $(CHECKERS) .vllm-* .mypy_cache .pytest_cache .ruff_cache .hypothesis
