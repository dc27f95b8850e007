# Thin calls; everything they need is installed into .venv. Python 3.11 or newer is the only need.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Two workers with one thread each: more threads than cores make every tensor operation slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 2
# A worker takes what lies together, so that a file's fixtures are mostly made once.
SHARED := -n $(WORKERS) --dist worksteal

# Every worker, pass and started command imports the same files; empty means that bytecode is kept.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test check bench machine-code test-library test-interpreter test-compiled format \
	clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

demo: $(VENV)/.installed-play ## a remembered walk, side by side with the truth, in out/demo
	$(BIN)/decmem demo

test: ## everything that CI runs; what takes one core runs two at a time
	@$(MAKE) --no-print-directory --output-sync -j 2 check test-compiled machine-code
	@$(MAKE) --no-print-directory test-library test-interpreter

check: $(VENV)/.installed-dev ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

machine-code: $(VENV)/.installed-dev ## compile the world once, for every worker and test
	$(BIN)/decmem world render --seed 0 --walk train --frames 9 --size 32 48 --out out/compiled

test-library: $(VENV)/.installed-dev ## all tests, array shapes checked at run time
	$(PYTEST) $(SHARED) --durations=15 -m "not interpreter"

test-interpreter: $(VENV)/.installed-dev ## the Triton kernels, interpreted on the CPU
	TRITON_INTERPRET=1 $(PYTEST) $(SHARED) -m interpreter --durations=5

test-compiled: $(VENV)/.installed-dev ## torch.compile, which the run-time shape checks would break
	TRITON_INTERPRET=1 $(PYTEST) --no-shape-checks tests/compiled --durations=5

bench: $(VENV)/.installed-play ## time the parts; the JSON goes to benchmarks/results
	$(BIN)/decmem bench rollout --out benchmarks/results

format: $(VENV)/.installed-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and every cache
	rm -rf $(VENV) build out .pytest_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[$*]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or newer"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is too old; install Python 3.11 or newer, or set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }
