# `make quickstart` and `make test` do all their own set-up: .venv, then pip under constraints.txt. Once that is done, a
# second call starts at once. Variables, given before or after `make`:
#   PYTHON=python3.12      the interpreter that .venv is made from (3.11 or newer)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    where torch comes from, instead of pip's default index
#   TEST_WORKERS=4         processes that run the tests, one torch thread each
#   PYTEST_ARGS=...        more arguments for pytest

PYTHON ?= python3
TORCH_INDEX ?=
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
# Without byte code, which Python writes when a module is first imported: most of torch and transformers never is.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# A stamp is touched only after pip has succeeded, so an interrupted installation is taken up again.
VENV := .venv/.stamp-venv
TORCH := .venv/.stamp-torch
RUNTIME := .venv/.stamp-runtime
DEV := .venv/.stamp-dev
PINS := pyproject.toml constraints.txt
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart test slow gpu gpus bench lint format types contract check ci setup clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-11s %s\n' "$$name" "$$text"; done

quickstart: $(RUNTIME) ## train, evaluate and sample a small model on this CPU, in minutes, with no download of weights
	@$(BIN)/unmask quickstart

test: $(DEV) ## the quick tests
	$(PYTEST) -m "not slow and not gpu and not gpus" $(PYTEST_ARGS)

slow: $(DEV) ## the tests that are slow by nature
	@# Exit status 5 says that no test carries the marker.
	$(PYTEST) -m "slow and not gpus" --durations=25 $(PYTEST_ARGS) || [ $$? -eq 5 ]

gpu: $(DEV) ## the checks that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

gpus: $(DEV) ## the checks that need two CUDA devices or more
	$(BIN)/python -m pytest -m gpus $(PYTEST_ARGS)

bench: $(DEV) ## the benchmarks: ratios and distances from the counted floor
	$(BIN)/python -m benchmarks

lint: $(DEV) ## style: ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV) ## rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## pyright
	$(BIN)/pyright

contract: $(DEV) ## the direction of imports
	$(BIN)/lint-imports

check: lint types contract test ## what to run before a commit

ci: ## what CI runs: check, then the slow tests
	.ci/run

setup: $(DEV) ## .venv with everything that a developer needs

clean: ## remove .venv and the tools' caches
	rm -rf .venv .pytest_cache .hypothesis .ruff_cache .import_linter_cache build dist
	find unmask tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV):
	@$(PYTHON) -c '' || { echo "unmask: no Python at '$(PYTHON)'; name one of 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "unmask: needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V); name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# With TORCH_INDEX, torch comes from there first, without the constraints: such an index holds few versions of torch's
# own dependencies, and the next step brings those to their pins. A changed index replaces the installed build.
ifneq ($(TORCH_INDEX),)
$(TORCH): FORCE | $(VENV)
	@if [ "$$(cat $@ 2>/dev/null)" != "$(TORCH_INDEX)" ]; then set -e; \
		pin=$$(grep '^torch==' constraints.txt); \
		echo "Installing $$pin from $(TORCH_INDEX)"; \
		$(PIP) uninstall -qq --yes torch; \
		$(PIP) install -qq --no-compile --index-url "$(TORCH_INDEX)" "$$pin"; \
		echo "$(TORCH_INDEX)" > $@; fi
else
$(TORCH): | $(VENV)
	@touch $@
endif

$(RUNTIME): $(PINS) $(TORCH) | $(VENV)
	@echo "Installing unmask into .venv (once, a few minutes; torch may be a download of GBs)"
	$(PIP) install -qq --no-compile -c constraints.txt -e .
	@touch $@

$(DEV): $(PINS) $(TORCH) | $(VENV)
	@echo "Installing unmask and its development tools into .venv (once, a few minutes; torch may be a download of GBs)"
	$(PIP) install -qq --no-compile -c constraints.txt -e '.[dev]'
	@touch $(RUNTIME) $@
