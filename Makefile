# `make demo`, `make test` and `make docs` are all a user needs; each makes the environment first if it is missing.
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo test attack docs clean

demo: $(READY)
	$(BIN)/reid-train --epochs 5

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Kills, damaged files, hostile input and full disks, about 15 minutes on two cores; the test suite has a short version. Then launchers of several processes.
attack: $(READY)
	$(BIN)/python tests/attack.py
	LAUNCHERS=1 $(BIN)/python -m pytest -q tests/test_distributed.py -k 'two_nodes or accelerate'

# The whole site from scratch, as a stale page would hide a broken link. `python -m http.server -d _docs/html` shows it.
docs: $(READY)
	rm -rf _docs
	$(BIN)/python -m sphinx -W --keep-going -q -d _docs/doctrees nbs _docs/html

$(READY): setup.py settings.ini pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import pip, sys; assert sys.version_info>=(3,10)' 2>/dev/null || { echo '.venv has no pip, or a Python below 3.10. Remove it, and name a newer one: make PYTHON=python3.11'; exit 1; }
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist _docs *.egg-info
