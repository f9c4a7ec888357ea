PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint check bench clean

setup: $(READY)

# DS_BUILD_OPS=0: nothing here needs DeepSpeed's compiled operators
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: setup
	$(BIN)/gpc-dist train demo --run.name demo-linear-probe --adapter.method linear-probe --train.resume false
	$(BIN)/gpc-dist train demo --run.name demo-prompt-tuning --adapter.method prompt-tuning --train.resume false
	$(BIN)/gpc-dist train demo --train.resume false
	$(BIN)/gpc-dist results runs/demo-linear-probe runs/demo-prompt-tuning runs/demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# DATA: a folder with SuperGLUE's RTE and BoolQ folders
bench: setup
	$(BIN)/python benchmarks/peer_peft.py --data $(DATA)

clean:
	rm -rf $(VENV) build *.egg-info
