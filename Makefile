# The same few verbs for people and for CI. `make help` lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup guest demo test check lab bench fuzz soak kills clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

setup:  ## Install what is missing: Debian packages, .venv, helpers
	@$(PYTHON) tools/setup.py

guest: setup  ## Build the guests that the demo and the tests boot
	@$(BIN)/python tools/build_guest.py
	@$(BIN)/python tools/build_tinydroid.py

demo: guest  ## Boot a real Linux guest and show its whole life (more arguments: ARGS=--json)
	@$(BIN)/vmactor demo $(ARGS)

check: setup  ## Lint, formatting, types, direction of imports
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo 'format: run .venv/bin/ruff format'; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports > build/imports.log || { cat build/imports.log; exit 1; }
	@echo 'check: passed'

test: guest check  ## Check, then run every test, those of the lab too (one module: ARGS=tests/test_bus.py)
	@$(BIN)/python -m pytest $(or $(ARGS),-n auto --dist loadfile)
	@$(if $(ARGS),,$(BIN)/python -m tools.kernel_lab)

lab: guest  ## Run the tests that need KVM, vhost-vsock and AF_VSOCK, in a guest that has them
	@$(BIN)/python -m tools.kernel_lab $(ARGS)

bench: guest  ## Measure all that bench/README.md has tables of (one: python -m bench.bench_crowd)
	@set -e; for name in bench_boot bench_runtime bench_images bench_composite bench_idsig bench_guest_rpc bench_lifecycle bench_crowd bench_rpc; do $(BIN)/python -m "bench.$$name" $(ARGS); done

fuzz: setup  ## Fuzz the parsers of foreign files and messages (more time, some only: ARGS='600 qcow2')
	@$(BIN)/python -m tools.fuzz $(ARGS)

soak: setup  ## Lead 20,000 VMs through their lives in one manager, and see that nothing grows (more: ARGS=50000)
	@$(BIN)/python -m tools.soak $(ARGS)

kills: setup  ## Kill managers under load for long, and see that no VM is lost (more: ARGS=1000)
	@VMACTOR_KILL_ROUNDS=$(or $(ARGS),300) $(BIN)/python -m pytest -s tests/test_keeping_loop.py

clean:  ## Remove everything built or downloaded, but not .venv
	@rm -rf build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
