# Each target works from a bare clone with Python >= 3.11 alone: .venv is made when it is absent, and filled again when setup.cfg changes.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --no-compile --editable
# All processors compile what was installed; pip would with one. What is left out is large, and hardly any of it is imported here.
# Some packages carry files that are no Python: those are left.
UNUSED := /tests/|/transformers/models/(?!auto/|bert/)|/torch/(_inductor|testing)/|/(pip|setuptools|sklearn|sentence_transformers)/
COMPILE := $(BIN)/python -W ignore -m compileall -q -j 0 -x '$(UNUSED)' .venv/lib > /dev/null 2>&1 || true

.PHONY: quickstart test verify
.DELETE_ON_ERROR:

quickstart: .venv/.lightcap
	$(BIN)/lightcap run quickstart

test: .venv/.lightcap-test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

verify: .venv/.lightcap-test
	$(BIN)/python -m pytest -q -m slow

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("lightcap needs Python 3.11 or newer; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/.lightcap: setup.cfg pyproject.toml | .venv/bin/python
	$(INSTALL) .
	@$(COMPILE)
	@touch $@

.venv/.lightcap-test: setup.cfg pyproject.toml | .venv/bin/python
	$(INSTALL) '.[test,photos]'
	@$(COMPILE)
	@touch $@ .venv/.lightcap
