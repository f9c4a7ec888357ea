PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# one worker for each core; what tests share, one worker has (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest -n auto --no-loadscope-reorder

.PHONY: setup demo test test-fast coverage lint check bench clean

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
	$(PYTEST)

# no process groups, no Ray, no Slurm, no browser
test-fast: setup
	$(PYTEST) -m 'not (slow or ray or slurm or browser)'

# of all tests, in all their processes; MARKS='not slow' for fewer
coverage: setup
	$(PYTEST) -m '$(MARKS)' --cov --cov-report=term:skip-covered

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
