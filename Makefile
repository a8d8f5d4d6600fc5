# `make` alone lists the targets. Every target that needs the environment builds it first.
#
#   PYTHON=python3.12   the interpreter to build the environment with
#   VENV=path           an environment of your own, used as it is instead of the one built here
#   ARGS="-k agc -x"    passed on by `test`, `demo`, `bench` and `gpu`

SHELL  := /bin/sh
# The first interpreter that can build an environment; plain python3 where there is none, for its error message.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
    "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    && echo "$$python" && exit; done; echo python3)
ARGS   ?=

ifdef VENV
BUILD_VENV = @test -x "$(VENV)/bin/python" || { echo "VENV=$(VENV) has no bin/python" >&2; exit 1; }
else
VENV := $(shell "$(PYTHON)" .ci/make_venv.py --where)
$(if $(VENV),,$(error give the interpreter to use with PYTHON=))
BUILD_VENV = @"$(PYTHON)" .ci/make_venv.py
endif

# PYTHONPATH makes the present checkout win over the one that the environment was built from.
RUN := PYTHONPATH="$(CURDIR)/src" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$(VENV)/bin/python"

DEMO := runs/digits

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-all test-lowest faults lint format typecheck bad-input audit bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

venv: ## Build the environment, unless it is there; its path is printed
	$(BUILD_VENV)
	@echo "$(VENV)"

demo: venv ## Train on scikit-learn's digits with 2 processes, beat 95% test accuracy, show the curve
	ACCELERATE_USE_CPU=true $(RUN) -m accelerate.commands.launch --config_file recipes/configs/cpu.yaml \
	    recipes/imagenet.py --dataset-name digits --output-dir $(DEMO) $(ARGS) </dev/null
	@$(RUN) .ci/check_demo.py $(DEMO)

test: venv ## Run the test suite
	$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: venv ## Run the tests that take no more than seconds, in less than two minutes
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow and not long" $(ARGS)

test-lowest: ## Run the test suite with the oldest versions that pyproject.toml allows
	@"$(PYTHON)" .ci/make_venv.py --lowest
	$(MAKE) test VENV="$$("$(PYTHON)" .ci/make_venv.py --lowest --where)"

faults: venv ## Kill, damage and resume trainings and prepared data, for an hour or so; the score is printed
	$(RUN) tests/faults/checkpoints.py $(ARGS)
	$(RUN) tests/faults/prepare_faults.py $(ARGS)
	$(RUN) tests/faults/runs.py
	$(RUN) tests/faults/disks.py
	$(RUN) tests/faults/data_workers.py

test-all: venv ## Run the test suite, with the variants that take long
	$(RUN) -m pytest -n 2 --dist loadfile -m "" $(ARGS)

lint: venv ## Check format, style and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: venv ## Rewrite the files in the project's format
	$(RUN) -m ruff check --fix --exit-zero --quiet .
	$(RUN) -m ruff format .

typecheck: venv ## Check the types alone
	$(RUN) -m mypy

bad-input: venv ## Try every wrong command line and call, and print the score
	$(RUN) -W ignore tests/bad_input $(ARGS)

audit: venv ## Look for known vulnerabilities and dangerous calls; installs bandit and pip-audit beside the environment
	$(RUN) -m pip install --quiet --target .audit bandit pip-audit
	PYTHONPATH=.audit "$(VENV)/bin/python" -m bandit -q -r -c pyproject.toml src recipes
	PYTHONPATH=.audit "$(VENV)/bin/python" -m pip_audit --path "$$("$(VENV)/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

bench: venv ## Run the benchmarks
	$(RUN) -m benchmarks $(ARGS)

.PHONY: gpu
gpu: venv ## Check and measure everything that needs a GPU, in ten minutes; writes runs/gpu.json and .md
	$(RUN) -m benchmarks.gpu $(ARGS)

.PHONY: performance
performance: venv ## Measure everything that docs/performance.md shows, and write it there; ARGS="--only WORDS" for a part
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.page $(ARGS)

.PHONY: docs
docs: venv ## Build the documentation into site/; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

clean: ## Delete what runs and tools leave in the checkout; the environment stays
	rm -rf runs dist build site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
