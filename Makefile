# `make quickstart` and `make test` need only Python >= 3.11, make and git: they build .venv themselves.
.PHONY: help venv quickstart test test-serving soak quality style
.DEFAULT_GOAL := help

# The first Python that trl and transformers accept; the plain `python3` of some systems is older.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# Each worker loads torch and transformers, so more than eight cost more memory than they save time.
WORKERS ?= $(shell if [ $(CORES) -lt 2 ]; then echo 2; elif [ $(CORES) -gt 8 ]; then echo 8; else echo $(CORES); fi)

ifeq ($(shell nvidia-smi >/dev/null 2>&1 && echo yes),yes)
TORCH ?= torch
ACCELERATE_CONFIG ?= examples/accelerate_configs/single_gpu.yaml
else
# pip takes the +cpu build of this version where it can see one.
TORCH ?= torch==2.13.0
ACCELERATE_CONFIG ?= examples/accelerate_configs/single_cpu.yaml
endif

# The shipped drafter that the quickstart starts from.
DRAFTER ?= dflash

help:
	@echo "make quickstart   train on the pocket world: SFT continued against Draft-OPD, from the same drafter"
	@echo "make test         run the tests"
	@echo "make test-serving load drafters with SGLang's and vLLM's own loaders, on a CPU (downloads some 600 MB once)"
	@echo "make soak         put the promises of docs/source/reliability.md to the test, 30 minutes on 2 cores"
	@echo "make quality      check style; make style mends what it can"
	@echo "make venv         build .venv, which the others do by themselves (PYTHON=..., TORCH=... choose what goes in)"

venv: .venv/installed

# torch comes first and alone, so that no other package's requirement chooses its build.
.venv/installed: setup.cfg
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found, which trl and transformers need: install one, or pass PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check "$(TORCH)"
	.venv/bin/python -m pip install --disable-pip-version-check --use-pep517 --editable ".[dev]"
	@touch $@

# accelerate reads OMP_NUM_THREADS as the threads a process may use; unset, it counts physical cores and warns.
quickstart: .venv/installed
	OMP_NUM_THREADS=$(CORES) .venv/bin/accelerate launch --config_file $(ACCELERATE_CONFIG) examples/train.py --drafter $(DRAFTER)

# One thread a worker, as the workers share the cores. CI is unset so that a test sees the same environment everywhere.
test: .venv/installed
	env -u CI HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

# Not part of the tests: each engine gets an environment of its own in ~/.cache/draft_opd_trl/serving.
test-serving: .venv/installed
	env -u CI HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 .venv/bin/python -m pytest -q -rs -s tests/serving/check_engines.py

# One thread a process, as it starts one for each core. Its last line is JSON.
soak: .venv/installed
	env -u CI HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python examples/soak/soak.py

quality: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

style: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
