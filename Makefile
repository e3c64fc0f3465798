# `make quickstart` and `make test` need only Python >= 3.11, make and git: they build .venv themselves.
.PHONY: help venv quickstart real real-quick test docs test-serving test-newest constraints soak gpu quality style
.DEFAULT_GOAL := help

# The first Python that trl and transformers accept; the plain `python3` of some systems is older.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# Each worker loads torch and transformers, so more than eight cost more memory than they save time.
WORKERS ?= $(shell if [ $(CORES) -lt 2 ]; then echo 2; elif [ $(CORES) -gt 8 ]; then echo 8; else echo $(CORES); fi)

# The known-good version; of a build for CPUs and one with CUDA, pip takes whichever it can see.
TORCH ?= torch==2.13.0
ifeq ($(shell nvidia-smi >/dev/null 2>&1 && echo yes),yes)
ACCELERATE_CONFIG ?= examples/accelerate_configs/single_gpu.yaml
else
ACCELERATE_CONFIG ?= examples/accelerate_configs/single_cpu.yaml
endif
# The versions that the tests last passed with; `make constraints` renews the file.
CONSTRAINTS ?= constraints.txt

# The shipped drafter that the quickstart starts from, and the temperature of all its texts.
DRAFTER ?= dflash-narrow
TEMPERATURE ?= 0

help:
	@echo "make quickstart   train on the pocket world: SFT continued against Draft-OPD, from the same drafter"
	@echo "make real-quick   SFT continued against Draft-OPD on SmolLM2-135M-Instruct, a real model: 20 minutes on 2 cores (REAL=options of the script)"
	@echo "make real         the same from nothing, in a night"
	@echo "make test         run the tests"
	@echo "make docs         build the site into docs/build, without a network; a dead link is an error"
	@echo "make test-serving load drafters by SGLang, vLLM, speculators and SpecForge, and serve them by vLLM, on a CPU (downloads some 2 GB once)"
	@echo "make test-newest  run the tests with the newest releases of everything but torch, in .venv-newest"
	@echo "make constraints  the same, and if they pass, write these versions to constraints.txt"
	@echo "make soak         put the promises of docs/source/reliability.md to the test, 30 minutes on 2 cores"
	@echo "make gpu          measure on a GPU what fits into MINUTES (60), and go on where that was"
	@echo "make quality      check style and imports; make style mends what it can"
	@echo "make venv         build .venv, which the others do by themselves (PYTHON=..., TORCH=... choose what goes in)"

venv: .venv/installed

# torch comes first and alone, so that no other package's requirement chooses its build.
define install
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found, which trl and transformers need: install one, or pass PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(1)
	$(1)/bin/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(1)/bin/python -m pip install --disable-pip-version-check --use-pep517 --editable ".[dev,docs]" $(2)
endef

.venv/installed: setup.cfg $(CONSTRAINTS)
	$(call install,.venv,--constraint $(CONSTRAINTS))
	@touch $@

# accelerate reads OMP_NUM_THREADS as the threads a process may use; unset, it counts physical cores and warns.
quickstart: .venv/installed
	OMP_NUM_THREADS=$(CORES) .venv/bin/accelerate launch --config_file $(ACCELERATE_CONFIG) examples/quickstart.py --drafter $(DRAFTER) --temperature $(TEMPERATURE)

# Target and prompts are the Hub's, or those of REAL="--target FOLDER --prompts FILE --suites FILE,FILE".
REAL ?=
real: .venv/installed
	OMP_NUM_THREADS=$(CORES) .venv/bin/python examples/smollm/real.py $(REAL)

real-quick: .venv/installed
	OMP_NUM_THREADS=$(CORES) .venv/bin/python examples/smollm/real.py --quick --kind dflash --output_dir outputs/smollm-quick $(REAL)

# One thread a worker, as the workers share the cores. CI is unset so that a test sees the same environment everywhere.
TEST = env -u CI HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

test: .venv/installed
	$(call TEST,.venv)

# Warnings are errors: a dead link, a page in no table of contents. Built anew, so that no page stays that is gone.
docs: .venv/installed
	rm -rf docs/build
	HF_HUB_OFFLINE=1 .venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going \
	    --doctree-dir docs/build/.doctrees --conf-dir docs docs/source docs/build
	@echo "The site: docs/build/index.html"

# Built anew each time, as what is newest changes daily.
test-newest:
	rm -rf .venv-newest
	$(call install,.venv-newest)
	$(call TEST,.venv-newest)

# torch and what comes with it are TORCH's affair.
constraints: test-newest
	{ echo "# What the tests last passed with; \`make constraints\` renews it."; \
	  .venv-newest/bin/python -m pip freeze --exclude-editable --exclude torch | grep -Ev '^(nvidia-|triton|cuda-)|@ file:'; } > $(CONSTRAINTS).part
	mv $(CONSTRAINTS).part $(CONSTRAINTS)

# Not part of the tests: each engine gets an environment of its own in ~/.cache/draft_opd_trl/serving.
test-serving: .venv/installed
	env -u CI HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 .venv/bin/python -m pytest -q -rs -s tests/serving/check_*.py

# One thread a process, as it starts one for each core. Its last line is JSON.
soak: .venv/installed
	env -u CI HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python examples/soak/soak.py

# Its last line is JSON.
gpu: .venv/installed
	env -u CI HF_HUB_OFFLINE=1 .venv/bin/python examples/benchmarks/gpu.py --minutes $(or $(MINUTES),60)

quality: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache --no-logo

style: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
