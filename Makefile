# Saga Exchange. Needs make and Python 3.11 or newer; everything else is installed into .venv from requirements.lock.
#
#   make run     the whole exchange in the foreground, until Ctrl-C
#   make demo    traders at work on the running exchange      (ARGS="--help" for its options)
#   make test    all tests                                    (ARGS="tests/unit -k margin" for some)
#   make check   style, types and layering
#   make bench   the benchmarks                               (ARGS="--help" for their options)

PYTHON3 ?= $(shell command -v python3.11 || command -v python3)
PYTHON = .venv/bin/python
SOURCES = $(wildcard settings.py clients.py worker.py domain storage activities workflows engine market monitors reporting \
	api stack demo bench client tests)

.PHONY: run demo test check bench

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

# Made anew only when the lock file has changed.
.venv/installed: requirements.lock
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON3=…")'
	@echo "Installing packages into .venv"
	@$(PYTHON3) -m venv .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	@cp requirements.lock .venv/installed
