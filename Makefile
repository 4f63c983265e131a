PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.stamp

# One thread per worker: JOBS workers that each start a thread per core would only fight for them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help setup demo recall bench docs figures reference faults lock advisories test test-slow lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install, unless it is up to date

# torch goes first and alone: which build of it fits is up to the machine. Everything else is taken by hash.
$(STAMP): pyproject.toml constraints.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "constraints.txt pins releases that need Python 3.11 or later, but .venv has $$($(BIN)/python -V); remove .venv and run: make setup PYTHON=python3.11" >&2; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## train, convert and audit a small model; the report lands in out/demo
	$(BIN)/equipoise demo --output out/demo

bench: setup ## time the CPU operators beside their peers, one thread, and compare with the bars
	OMP_NUM_THREADS=1 $(BIN)/equipoise bench cpu --output benchmarks

recall: setup ## convert a donor that recalls, and ask beyond the windows' reach; the report lands in out/recall
	$(BIN)/equipoise recall-demo --output out/recall --seeds 0,1,2

# --strict makes errors of the site's own warnings (links, pages); griffe's, about docstrings, are only printed.
docs: setup ## build the documentation site into out/site, warnings as errors
	$(BIN)/python tools/command_line.py
	@mkdir -p out && $(BIN)/zensical build --strict --clean > out/site.log 2>&1 || { cat out/site.log; exit 1; }
	@! grep '^griffe:' out/site.log
	@echo "the site is in out/site; open out/site/index.html"

figures: setup ## draw the figures of docs/method.md again
	$(BIN)/python tools/method_figures.py

reference: setup ## list the public names again, after a change that was meant
	$(BIN)/python tools/public_names.py

faults: setup ## strike runs at every point of the fault suite, resume them, and print what was lost (nothing)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults --seeds 10 --jobs $(JOBS) --output out/faults

lock: setup ## pin what is installed in requirements.lock, with hashes; needs PyPI
	$(BIN)/python tools/lock.py

# Fails where something is known, and where it could not be asked: then it says NOT CHECKED.
advisories: setup ## ask PyPI for known vulnerabilities of what is locked
	$(BIN)/python tools/advisories.py

test: setup ## the fast tests
	$(PYTEST)

test-slow: setup ## the slow tests; finding none is an error
	@$(PYTEST) -m slow; status=$$?; \
	if [ $$status -eq 5 ]; then echo "no test carries the slow marker: the slow suite is gone, or collection is broken" >&2; fi; \
	exit $$status

lint: setup ## ruff, pyright and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup ## rewrite the code the way lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove outputs and caches, keep .venv
	rm -rf out build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
