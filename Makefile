# Two commands for a fresh machine with Python 3.11 and make: `make study` and `make test`.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/study/tiny.py
WORKDIR ?= runs/study
PARITY := .cache/parity-venv

.PHONY: study test parity lint lock clean

study: $(VENV)/installed
	$(BIN)/alignment-gap study --config=$(CONFIG) --workdir=$(WORKDIR) $(FLAGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(FLAGS)

# Not part of `make test`: torch (the CPU build), TRL and transformers never meet the library's own pins.
parity: $(PARITY)/installed
	$(PARITY)/bin/python -m pytest tests/parity -W default --confcutdir tests/parity $(FLAGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything is pinned; bytecode is compiled now so that no later start pays for it.
$(VENV)/installed: requirements.lock setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

$(PARITY)/installed: requirements-parity.lock
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --no-deps --requirement requirements-parity.lock
	touch $@

lock:
	$(BIN)/uv pip compile setup.py --extra study --extra dev --python-version 3.11 --no-emit-index-url --no-header --upgrade --output-file requirements.lock

clean:
	rm -rf $(VENV) runs .cache
