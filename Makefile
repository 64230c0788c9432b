# Recipes; `make` alone lists them. All they install goes into .venv, nothing into the system.

PYTHON ?= python3
# Most tests wait for processes more than they compute: three at once keep two cores busy.
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
# What a recipe for a first look needs is installed in seconds; the tools of `make test` bring a PostgreSQL server.
STAMP_DEMO := $(VENV)/.installed-rich
STAMP_SHOP := $(VENV)/.installed-shop
PYTEST = $(BIN)/python -m pytest -n "$(JOBS)"
# One test alone needs no workers.
ONE = $(if $(findstring ::,$(T)),$(BIN)/python -m pytest,$(PYTEST))
BRIEF := not slow and not browser and not cron

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo shop test test-fast test-postgres test-slow test-browser test-cron test-all torture torture-mutants lint bench clean

help:
	@echo 'make RECIPE, where RECIPE is one of:'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

demo: $(STAMP_DEMO)  ## index the standard library in the background, half a minute to watch; DEMO=folder for another one
	@$(BIN)/python examples/index/demo.py $(if $(DEMO),"$(DEMO)")

shop: $(STAMP_SHOP)  ## open the example shop in which a browser watches its imports; PORT=8000
	@$(BIN)/python examples/shop/serve.py $(if $(PORT),--port "$(PORT)")

test: $(STAMP)  ## run the tests, but for the slow ones, the browser's and cron's; JOBS=3 at once, T=path for one file or test
	$(if $(T),$(ONE) "$(T)",$(PYTEST) -m "$(BRIEF)")

test-fast: $(STAMP)  ## run the tests that start no process and need no server, in less than a minute
	$(PYTEST) -m "$(BRIEF)" -k "not postgres" tests/unit tests/ledger tests/architecture

test-postgres: $(STAMP)  ## run the end-to-end tests with all rows in PostgreSQL, which comes with the tools; a quarter of an hour
	$(PYTEST) --database postgres -m "any_database and $(BRIEF)"

test-slow: $(STAMP)  ## run the slow tests
	$(PYTEST) -m slow

# One test each, for which one worker is enough.
test-browser test-cron: JOBS := 1

test-browser: $(STAMP)  ## run the tests in a headless Chromium, which must be there (Debian: apt-get install chromium)
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	$(PYTEST) -m browser

test-cron: $(STAMP)  ## run the tests with the machine's own cron daemon, as root (Debian: apt-get install cron)
	$(PYTEST) -m cron

test-all: $(STAMP)  ## run everything there is, for a night: all tests, SEEDS=3 tortures of 5 minutes on each database, all mutants
	@failed=; run() { echo "== make $$*"; $(MAKE) --no-print-directory "$$@" || failed="$$failed, make $$*"; }; \
	for recipe in lint test test-postgres test-slow test-cron test-browser torture-mutants; do run $$recipe; done; \
	for seed in $$(seq $(or $(SEEDS),3)); do for database in sqlite postgres; do \
		run torture SECONDS=$(or $(SECONDS),300) SEED=$$(date +%F)-$$seed DATABASE=$$database; \
	done; done; \
	if [ -n "$$failed" ]; then echo "failed: $${failed#, }" >&2; exit 1; fi; echo 'everything passed'

torture: $(STAMP)  ## kill and stop everything at random, then check the promises; SEED= SECONDS=30 TASKS=0 RATE=5 DATABASE=postgres
	@$(if $(filter postgres,$(DATABASE)),$(BIN)/python tests/support/postgres_server.py )$(BIN)/python -m torture --seconds "$(or $(SECONDS),30)" --tasks "$(or $(TASKS),0)" --rate "$(or $(RATE),5)" $(if $(SEED),--seed "$(SEED)") $(if $(filter postgres,$(DATABASE)),--database URL)

torture-mutants: $(STAMP)  ## remove one guard at a time and see a test fail for each; BY=torture has the torture test do it
	@$(BIN)/python -m torture.mutants $(if $(filter torture,$(BY)),--torture)

lint: $(STAMP)  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(STAMP)  ## measure what bgsupervisor costs
	$(BIN)/python bench/bench.py

clean:  ## remove .venv, .demo, caches and build products
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew when the dependencies may have changed; an editable install sees all other changes by itself.
$(STAMP) $(STAMP_DEMO) $(STAMP_SHOP): $(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "bgsupervisor needs Python 3.11 or newer, and '$(PYTHON)' is none; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing bgsupervisor[$*] into $(VENV); done once, and after changes of pyproject.toml.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
