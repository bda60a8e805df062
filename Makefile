# Saga Exchange. Needs make and Python 3.11 or newer; everything else is installed into .venv from requirements.lock.
#
#   make run     the whole exchange in the foreground, until Ctrl-C
#   make demo    traders at work on the running exchange      (ARGS="--help" for its options)
#   make test    all tests                                    (ARGS="tests/unit -k margin" for some)
#   make check   style, types and layering
#   make bench   the benchmarks                               (ARGS="risk" for one; options: python -m bench.fanout --help)
#   make histories  the tests' workflow histories anew        (or from a running exchange: docs/operations.md)
#   make lock    both lock files, after a change of pyproject.toml

PYTHON3 ?= $(shell command -v python3.11 || command -v python3)
PYTHON = .venv/bin/python
SOURCES = $(wildcard settings.py clients.py logs.py worker.py domain telemetry storage activities workflows engine market monitors reporting \
	api stack demo bench client deploy tests)

.PHONY: run demo test check bench histories lock

# child.py passes the end of make on to the exchange, also when make is killed.
run: .venv/installed
	@$(PYTHON) stack/child.py --signal 15 $(PYTHON) -m stack

demo: .venv/installed
	@$(PYTHON) -m demo $(ARGS)

test: .venv/installed
	$(PYTHON) -m pytest $(ARGS)

check: .venv/installed
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy $(SOURCES)
	.venv/bin/lint-imports

bench: .venv/installed
	@$(PYTHON) -m bench $(ARGS)

# The tests that make the histories write them down; then today's code replays all of them.
histories: .venv/installed
	EXCHANGE_SAVE_HISTORIES=1 $(PYTHON) -m pytest $(shell grep -rl save_history tests/integration)
	$(PYTHON) -m pytest -n 0 tests/integration/test_workflows_replay.py

COMPILE = $(PYTHON) -m uv pip compile pyproject.toml --quiet --generate-hashes --universal --python-version 3.11 \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links
lock: .venv/installed
	$(COMPILE) --extra dev --output-file requirements.lock
	$(COMPILE) --constraint requirements.lock --output-file requirements-runtime.lock

# Made anew only when the lock file has changed.
.venv/installed: requirements.lock
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON3=…")'
	@echo "Installing packages into .venv"
	@$(PYTHON3) -m venv .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	@cp requirements.lock .venv/installed
