# `make demo` and `make test` are all a user needs; both make the environment first if it is missing.
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo test clean

demo: $(READY)
	$(BIN)/reid-train --epochs 5

test: $(READY)
	$(BIN)/python -m pytest -q

$(READY): setup.py settings.ini pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
