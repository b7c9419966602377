# make demo    train the embedded example on whatever this machine has (the default)
# make test    run the whole test suite
# make kills   kill every command at every change of a file (an hour)
# make smoke   run every benchmark at its smallest, and the smallest experiment
# make test-oldest       the suite with the oldest versions (constraints-oldest.txt, several GB)
# make test-cuda-build   what a GPU would run, with a CUDA build of torch; needs no GPU
# make fuzz    hostile rows and options through the commands: FUZZ_INPUTS of them from FUZZ_START
# make test-slurm        the Slurm script on a cluster of this machine; needs root and slurm-wlm
# make lint    check style, change nothing
# make clean   remove what building, testing and linting leave behind; runs/ and .venv stay
#
# Variables: PYTHON (makes the environment), VENV, PYTEST_ARGS, FUZZ_INPUTS, FUZZ_START, FUZZ_JOBS
#   make test PYTEST_ARGS="-x -k ranking"
#   make test VENV="$CONDA_PREFIX"    to use an environment you already have

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

# Two processes with one thread each: the tests' tensors are small, so threads gain little.
PYTEST_ARGS ?= -q -n 2

# An install is repeated only when one of these changed: a stamp file remembers the last one.
INSTALL_INPUTS := pyproject.toml setup.py $(CONSTRAINTS)
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test

.PHONY: demo test kills test-oldest test-cuda-build test-slurm smoke fuzz lint clean

demo: $(INSTALLED)
	$(BIN)/python -m rrhf_fast.train

test: $(INSTALLED_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

OLDEST := VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-oldest:
	$(MAKE) test $(OLDEST)

test-cuda-build:
	$(MAKE) test $(OLDEST) PYTEST_ARGS="$(PYTEST_ARGS) tests/kernels tests/model"

kills: $(INSTALLED_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/kill.py runs/kills

test-slurm: $(INSTALLED_TEST)
	$(BIN)/python -m pytest -q -rs tests/cluster

smoke: $(INSTALLED_TEST)
	$(BIN)/python benchmarks/run.py all --preset smoke
	$(BIN)/python -m experiments smallest --work runs/smallest --results runs/smallest

# Each input is drawn from its number, by default the time's: a run that was cut off goes on from
# the last number it printed.
FUZZ_INPUTS ?= 50000
FUZZ_START ?= $(shell date +%s)000
FUZZ_JOBS ?= 2

fuzz: $(INSTALLED_TEST)
	$(BIN)/python -m tests.hostile.fuzz --start $(FUZZ_START) --count $(FUZZ_INPUTS) --jobs $(FUZZ_JOBS)

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(INSTALL_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e .
	touch $@

# Holds all that `demo` needs, hence both stamps.
$(INSTALLED_TEST): $(INSTALL_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[test]'
	touch $(INSTALLED) $@
