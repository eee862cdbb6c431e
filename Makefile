# Two commands for a fresh machine with Python 3.11 and make: `make study` and `make test`.
PYTHON ?= $(shell command -v python3.11 || echo python3)
# The study's environment, and that of tests and lint, which also has TensorFlow, libtpu and the like (4 GB).
VENV := .venv
TEST_VENV := .venv-test
CONFIG ?= configs/study/tiny.py
WORKDIR ?= runs/study
PARITY := .cache/parity-venv
DOCS := .cache/docs-venv

.PHONY: study test results parity docs lint lock clean

study: $(VENV)/installed
	$(VENV)/bin/alignment-gap study --config=$(CONFIG) --workdir=$(WORKDIR) $(FLAGS)

test: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder $(FLAGS)

# README's table of claims, and the tables and figures in docs/results, from the measurements that are kept there.
results: $(VENV)/installed
	$(VENV)/bin/python docs/results/make.py

# Not part of `make test`: torch (the CPU build), TRL, transformers and PEFT never meet the library's own pins.
parity: $(PARITY)/installed
	$(PARITY)/bin/python -m pytest tests/parity -W default --confcutdir tests/parity $(FLAGS)

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

UV_COMPILE := $(TEST_VENV)/bin/uv pip compile --python-version 3.11 --no-emit-index-url --no-header --upgrade
COMPILE := $(UV_COMPILE) setup.py

lock:
	$(COMPILE) --extra study --output-file requirements.lock
	$(COMPILE) --extra study --extra dev --extra data --extra docs --extra huggingface --extra tensorboard --extra tpu \
	    --constraint requirements.lock --output-file requirements-test.lock
	grep '"docs": \[' setup.py | grep -o '"[^"]*=[^"]*"' | tr -d '"' | \
	    $(UV_COMPILE) - --constraint requirements-test.lock --output-file requirements-docs.lock

clean:
	rm -rf $(VENV) $(TEST_VENV) runs site .cache
