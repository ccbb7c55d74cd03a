# Cloister: everything a developer types. On a machine with only git and make, `make demo` and `make test` set up
# the rest (Debian or Ubuntu; as root, or as a user with sudo). The work is done by small scripts in tools/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-all lint format build wheel install bench lock setup clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## A real agent in the sandbox, four attacks that fail, a budget that ends a loop; needs no key
	@tools/demo

test: setup ## All tests but the slow ones, as an ordinary user, against the built wheel
	@tools/test -m 'not slow' --durations=15 $(ARGS)

test-quick: setup ## The same without the real agents from npm
	@CLOISTER_TESTS=quick tools/test -m 'not slow and not agents and not systemd' $(ARGS)

test-all: setup ## All tests, the slow ones too, some of them in a virtual machine
	@CLOISTER_TESTS=all HYPOTHESIS_PROFILE=thorough tools/test --durations=30 $(ARGS)

lint: setup ## Linters, type checker, import contracts, sizes, links
	@CLOISTER_TESTS=quick tools/test tests/style $(ARGS)

format: setup ## Format the Python sources in place
	@ruff=$$(tools/environment)/bin/ruff && "$$ruff" check --fix-only --quiet . && "$$ruff" format src tests tools

build: setup ## Build the wheel into dist/
	@tools/build

wheel: setup ## Build a wheel for other machines, with libbpf inside, into dist/ (manylinux)
	@tools/wheel-manylinux

install: ## Install: for all users as root, else for you alone
	@tools/packages install
	@tools/install

bench: setup ## Measure against plain bubblewrap and the field; results in benchmarks/
	@tools/bench $(ARGS)

lock: ## Renew requirements/*.txt and the agents' lock file
	@tools/lock

setup: ## Install missing Debian packages (the other targets call this)
	@tools/packages

clean: ## Remove what was built in this folder
	@rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/cloister/host/shim/cloister-shim \
		src/cloister/audit/bpf/*.bpf.o src/cloister/host/_*.abi3.so

distclean: clean ## Remove the cache as well (Python packages, agents)
	@bash -c 'source tools/common.sh && rm -rf "$$cache"'
