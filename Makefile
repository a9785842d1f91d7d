# Set-up and everyday commands. Each target makes what it needs; nothing is installed twice.
#   make chat    talk with the shipped model        make test    all tests of this machine
#   make serve   the same as a server with a page   make check   format, lint, types, imports
#   make bench   speed of the shipped model         make clean   forget the environment

VENV ?= .venv
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && command -v $$p && break; done)
TORCH := $(shell grep '^torch==' constraints.txt)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# Processes that share the tests' files, one thread of PyTorch's each.
JOBS ?= 2
# An older PyTorch is enough when it is all there is: make chat TORCH=torch==2.11.0

.DEFAULT_GOAL := help
.PHONY: help chat serve test check bench format clean
.SILENT:

help:
	sed -n '2,5s/^# *//p' Makefile

$(BIN)/python:
	test -n "$(PYTHON)" || { echo "persimmon needs Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	echo "creating $(VENV) with $(PYTHON)" >&2
	$(PYTHON) -m venv $(VENV)

NATIVE := CMakeLists.txt $(wildcard src/persimmon/fast/cpu/native/*)

# The CPU engine is C++: without a compiler the package installs all the same, with the reference engine only.
# PERSIMMON_REQUIRE_ENGINE=1 (as in .ci/run) makes that an error.
$(VENV)/base.done: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	echo "installing $(TORCH) (once)" >&2
	$(PIP) install --quiet "$(TORCH)"
	echo "building and installing persimmon (once)" >&2
	$(INSTALL) --editable .
	touch $@

# Extras of what base.done installed: pip adds what they name, and the engine is not compiled a second time.
$(VENV)/dev.done: $(VENV)/base.done
	echo "installing the test and development tools (once)" >&2
	$(INSTALL) 'persimmon[dev]'
	touch $@

# For tests/browser; without it, that one test says so and is skipped.
AXE := build/axe/node_modules/axe-core/axe.min.js

$(AXE):
	-npm install --silent --no-audit --no-fund --no-save --prefix build/axe axe-core@4.14.1

chat: $(VENV)/base.done
	$(BIN)/persimmon chat

$(VENV)/serve.done: $(VENV)/base.done
	echo "installing what the server needs (once)" >&2
	$(INSTALL) 'persimmon[serve]'
	touch $@

serve: $(VENV)/serve.done
	$(BIN)/persimmon serve

test: $(VENV)/dev.done $(if $(shell command -v npm),| $(AXE))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

check: $(VENV)/dev.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/base.done
	$(BIN)/persimmon bench decode mini --tokens 128
	$(BIN)/persimmon bench prefill mini

format: $(VENV)/dev.done
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
