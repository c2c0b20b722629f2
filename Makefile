# Every target sets up what it needs in .venv; nothing is installed outside this folder.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo docs test test-slow test-gpu lint mutants cluster clean

help:
	@echo "make demo       set up, then finetune a small video model on the bundled clip (about 10 minutes on 2 cores)"
	@echo "make test       set up, then run the default tests"
	@echo "make test-slow  the tests that take minutes each"
	@echo "make test-gpu   the tests that need an NVIDIA GPU (installs the cuda extra)"
	@echo "make lint       ruff and pyright"
	@echo "make mutants    small faults, put in one at a time, must be noticed by the tests (some 20 minutes; ARGS names some)"
	@echo "make cluster    the measurement of thread block clusters (needs nvcc and a Hopper GPU)"
	@echo "make docs       build the documentation into site/; fails on a dead link or a warning"
	@echo "make clean      remove .venv and caches"

$(VENV)/python: .python-version
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { echo "error: $(PYTHON) is not a Python 3.12 or newer; install one, or run 'make PYTHON=/path/to/python3.12 ...'" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/base: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/test: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/base

$(VENV)/cuda: $(VENV)/test
	$(BIN)/python -m pip install --quiet --editable '.[cuda,test]'
	@touch $@

demo: $(VENV)/base
	$(BIN)/monarchrt demo $(ARGS)

test: $(VENV)/test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/cuda
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/pyright

# all of them take some 20 minutes on 2 cores; ARGS names some: make mutants ARGS="spec.py cache.py"
mutants: $(VENV)/test
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.mutants $(ARGS)

# how fast a cluster of blocks passes data on, for the notes in benchmarks/; needs CUDA's compiler and a Hopper GPU
cluster:
	nvcc -arch=sm_90a -O3 -o /tmp/cluster benchmarks/cluster.cu && /tmp/cluster

$(VENV)/docs: $(VENV)/base
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
