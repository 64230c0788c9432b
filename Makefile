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

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo shop test test-postgres test-slow test-browser test-cron torture torture-mutants lint bench clean

help:
	@echo 'make RECIPE, where RECIPE is one of:'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

demo: $(STAMP_DEMO)  ## index the standard library in the background, half a minute to watch; DEMO=folder for another one
	@$(BIN)/python examples/index/demo.py $(if $(DEMO),"$(DEMO)")

shop: $(STAMP_SHOP)  ## open the example shop in which a browser watches its imports; PORT=8000
	@$(BIN)/python examples/shop/serve.py $(if $(PORT),--port "$(PORT)")

test: $(STAMP)  ## run the tests, but for the slow ones, the browser's and cron's; JOBS=3 at once
	$(BIN)/python -m pytest -n "$(JOBS)" -m "not slow and not browser and not cron"

# What is about processes, rows and commands, and not about SQLite's file.
ON_POSTGRES := adoption bad_bodies cycles cli cli_listing deploy doctor endings faults guards health housekeeping linux \
	logs fork server oom stacks stalls stopping supervisor suspending upgrading waiting waiting_hard why windows

test-postgres: $(STAMP)  ## run the end-to-end tests with all rows in PostgreSQL, which comes with the tools; a quarter of an hour
	$(BIN)/python -m pytest -n "$(JOBS)" --database postgres -m "not slow and not browser and not cron" $(ON_POSTGRES:%=tests/test_%.py)

test-slow: $(STAMP)  ## run the slow tests
	$(BIN)/python -m pytest -m slow

test-browser: $(STAMP)  ## run the tests in a headless Chromium, which must be there (Debian: apt-get install chromium)
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	$(BIN)/python -m pytest -m browser

test-cron: $(STAMP)  ## run the tests with the machine's own cron daemon, as root (Debian: apt-get install cron)
	$(BIN)/python -m pytest -m cron

torture: $(STAMP)  ## kill and stop everything at random, then check the promises; SEED= SECONDS=30 TASKS=0 RATE=5 DATABASE=postgres
	@$(if $(filter postgres,$(DATABASE)),$(BIN)/python tests/postgres_server.py )$(BIN)/python -m torture --seconds "$(or $(SECONDS),30)" --tasks "$(or $(TASKS),0)" --rate "$(or $(RATE),5)" $(if $(SEED),--seed "$(SEED)") $(if $(filter postgres,$(DATABASE)),--database URL)

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
