# `make help` lists the targets. PYTHON=... picks the interpreter, PIP_EXTRA_INDEX_URL=... the index that has torch's CPU wheels.

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
LOCK := requirements-cpu.lock
PY := $(VENV)/bin/python
# Processes that share the tests, a file each at a time.
WORKERS ?= 2
# Named after the lock's content: the same lock installs nothing, another one installs again.
STAMP := $(VENV)/.installed-$(shell sha256sum $(LOCK) | cut -c1-16)

# Libraries that report home are told not to.
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test soak bench bench-peers lint typecheck install clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

quickstart: $(STAMP) ## generate, distil and measure on this CPU; prints the evaluation table and the report's path
	@$(PY) -m pipeline run configs/quickstart.yaml

test: $(STAMP) ## what CI runs: everything but the tests marked gpu or soak
	@sh tools/ensure_chromium.sh
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not gpu and not soak" tests

soak: $(STAMP) ## the rest: long storms, kill loops, property runs; gpu tests where there is one
	@sh tools/ensure_chromium.sh
	@HYPOTHESIS_PROFILE=soak $(PY) -m pytest -m "gpu or soak" --timeout=7200 tests

bench: $(STAMP) ## what the README claims about speed, beside the peers that bench-peers installed (an hour or so)
	@for what in client memory plan vllm; do $(PY) -m benchmarks.generate $$what || exit; done

bench-peers: ## the peers of bench, each in an environment of its own under benchmarks/.peers
	@for peer in benchmarks/peers/*.txt; do sh tools/install_peer.sh "$(PYTHON)" "$$peer" || exit; done

lint: typecheck ## style, format, types, import order
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-logo

typecheck: $(STAMP) ## strict types
	@$(PY) -m mypy

install: $(STAMP) ## only the environment

$(STAMP):
	@sh tools/install.sh "$(PYTHON)" "$(VENV)" "$(LOCK)"
	@rm -f $(VENV)/.installed-*
	@touch $@

clean: ## caches of the tools; neither the environment nor any data
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache build dist *.egg-info
	@find pipeline tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
