# Two commands for a fresh machine with Python 3.11 and make: `make study` and `make test`.
PYTHON ?= $(shell command -v python3.11 || echo python3)
# The study's environment, and that of tests and lint, which also has TensorFlow, libtpu and the like (5 GB).
VENV := .venv
TEST_VENV := .venv-test
CONFIG ?= configs/study/tiny.py
WORKDIR ?= runs/study
PARITY := .cache/parity-venv
DOCS := .cache/docs-venv
# A checkout of google-research/t5x, and those of google/airio and google-research/jestimator, which T5X imports.
T5X ?=
AIRIO ?= $(T5X)/../airio
JESTIMATOR ?= $(T5X)/../jestimator
T5X_VENV := .cache/t5x-venv

.PHONY: study test test-all results parity t5x t5x-checkouts docs lint lock clean

study: $(VENV)/installed
	$(VENV)/bin/alignment-gap study --config=$(CONFIG) --workdir=$(WORKDIR) $(FLAGS)

# The tests that two cores run in a quarter of an hour, and all tests, which take 30 to 40 minutes.
test: SELECTED := -m "not slow"
test test-all: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder $(SELECTED) $(FLAGS)

# README's table of claims, and the tables and figures in docs/results, from the measurements that are kept there.
results: $(VENV)/installed
	$(VENV)/bin/python docs/results/make.py

# Not part of `make test`: torch (the CPU build), TRL, transformers and PEFT never meet the library's own pins.
parity: $(PARITY)/installed
	$(PARITY)/bin/python -m pytest tests/parity -W default --confcutdir tests/parity $(FLAGS)

# Not part of `make test`: T5X and what it imports are on no registry.
t5x: t5x-checkouts $(T5X_VENV)/installed
	PYTHONPATH=$(abspath $(T5X)):$(abspath $(AIRIO)):$(abspath $(JESTIMATOR)) $(T5X_VENV)/bin/python -m pytest tests/t5x -W default --confcutdir tests/t5x \
	    $(FLAGS)

t5x-checkouts:
	@test -n "$(T5X)" || { echo "T5X is not set: give a checkout of google-research/t5x, as in make t5x T5X=../t5x" >&2; exit 2; }
	@for file in $(T5X)/t5x/train.py $(AIRIO)/airio/core.py $(JESTIMATOR)/jestimator/amos.py; do test -f $$file || \
	    { echo "$$file is not there: set T5X, AIRIO and JESTIMATOR to checkouts; by default the latter are beside T5X" >&2; exit 2; }; done

# Reads the sources without importing them, so that the package and its dependencies are not installed for it.
docs: $(DOCS)/installed
	$(DOCS)/bin/mkdocs build --strict

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy

# Everything is pinned; bytecode is compiled now so that no later start pays for it.
$(VENV)/installed: requirements.lock setup.py
$(TEST_VENV)/installed: requirements-test.lock setup.py
$(VENV)/installed $(TEST_VENV)/installed:
	@echo "Installing $< into $(@D): this takes a minute or two"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet uv==0.13.9
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --compile-bytecode --requirement $<
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --no-deps --editable .
	touch $@

$(PARITY)/installed: requirements-parity.lock
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --no-deps --requirement requirements-parity.lock
	touch $@

$(DOCS)/installed: requirements-docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-deps --requirement requirements-docs.lock
	touch $@

$(T5X_VENV)/installed: requirements-t5x.lock setup.py
	$(PYTHON) -m venv $(T5X_VENV)
	$(T5X_VENV)/bin/python -m pip install --quiet uv==0.13.9
	$(T5X_VENV)/bin/uv pip install --quiet --python $(T5X_VENV)/bin/python --compile-bytecode --requirement $<
	$(T5X_VENV)/bin/uv pip install --quiet --python $(T5X_VENV)/bin/python --no-deps --editable .
	touch $@

UV_COMPILE := $(TEST_VENV)/bin/uv pip compile --python-version 3.11 --no-emit-index-url --no-header --upgrade
COMPILE := $(UV_COMPILE) setup.py

lock:
	$(COMPILE) --extra study --output-file requirements.lock
	$(COMPILE) --extra study --extra dev --extra data --extra docs --extra huggingface --extra tensorboard --extra tpu \
	    --extra plan-gpus --constraint requirements.lock --output-file requirements-test.lock
	grep '"docs": \[' setup.py | grep -o '"[^"]*=[^"]*"' | tr -d '"' | \
	    $(UV_COMPILE) - --constraint requirements-test.lock --output-file requirements-docs.lock
	echo cached_property fiddle grain pytest | tr ' ' '\n' | $(COMPILE) - --extra data --extra tensorboard \
	    --constraint requirements-test.lock --output-file requirements-t5x.lock

clean:
	rm -rf $(VENV) $(TEST_VENV) runs site .cache
