# Each target creates the virtual environment if it is missing or out of date. CI calls `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
COMPILERS = $(VENV)/compilers
TESTBED = slurm-wlm slurmdbd mariadb-server munge openssh-server iproute2

.PHONY: help install quickstart test test-fast test-client test-clusters test-gpu testbed compilers check format lock clean

help:
	@echo "make install        install the locked packages in $(VENV)"
	@echo "make quickstart     train a ResNet on this machine, with two processes"
	@echo "make test           run all checks, then all tests"
	@echo "make test-fast      run the tests that start no worker processes"
	@echo "make test-client    run those of them that cover what runs on a laptop; also on macOS"
	@echo "make test-clusters  run the tests that start worker processes, on SLURM and on TPU VMs that they raise"
	@echo "make test-gpu       run the tests that need an NVIDIA GPU, with a jax that has CUDA in $(VENV)"
	@echo "make testbed        install SLURM, MariaDB and sshd for the tests (as root on Debian)"
	@echo "make compilers      install the compilers for TPUs and GPUs that the tests need, which need neither (Linux)"
	@echo "make check          run ruff, mypy and import-linter"
	@echo "make format         fix and format the code with ruff"
	@echo "make lock           regenerate requirements.txt and requirements-tpu.txt"
	@echo "make clean          delete the virtual environments"

$(READY): requirements.txt setup.py
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "podlaunch needs Python 3.11 to 3.13; set PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

install: $(READY)

quickstart: $(READY)
	$(BIN)/launch configs/quickstart.yaml

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One step after another, each with its seconds in the file that STEP_SECONDS names, if it names one.
test:
	@for step in install check testbed compilers test-fast test-clusters; do \
	  begun=$$(date +%s); \
	  $(MAKE) --no-print-directory $$step || exit; \
	  printf '%6d s  make %s\n' $$(($$(date +%s) - begun)) $$step >>"$${STEP_SECONDS:-/dev/null}"; \
	done

test-fast: $(READY)
	$(BIN)/pytest -m "not cluster" --numprocesses 2 --dist worksteal

# They wait much, so more of them than there are cores; the tests of a file share what they have raised and trained.
test-clusters: $(READY) testbed compilers
	$(BIN)/pytest -m cluster --numprocesses 4 --dist loadfile

# Not part of `make test`, which rehearses them on the CPU. jax for CUDA is not among the locked packages.
test-gpu: $(READY)
	TEST_GPU_ON=gpu $(BIN)/pytest tests/gpu

# Tests of the code that runs on the user's machine. Tests marked linux cover code of hosts, which reads /proc.
test-client: $(READY)
	$(BIN)/pytest -m "not cluster and not linux" --numprocesses 2 tests/configs tests/launcher tests/test_packaging.py

# The tests start their own SLURM cluster, database and sshd, so policy-rc.d prevents the packages from starting services.
# Tests that need a missing program are skipped and give the reason.
testbed:
	@absent=$$(for program in slurmctld slurmdbd mariadbd munged sshd ip; do command -v $$program >/dev/null || echo $$program; done); \
	if [ -z "$$absent" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  policy=/usr/sbin/policy-rc.d; \
	  if [ ! -e $$policy ]; then \
	    trap "rm -f $$policy" EXIT INT TERM; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod +x $$policy; \
	  fi; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(TESTBED) >/dev/null; \
	else echo "not installed:" $$absent "(Debian: apt-get install $(TESTBED)): the tests that need them are skipped"; fi

# Beside the packages of the environment and not among them: there, jax would load them into each process.
$(COMPILERS)/.ready: benchmarks/environments/compilers.txt | $(READY)
	rm -rf $(COMPILERS)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $(COMPILERS) -r $<
	@touch $@

compilers:
	@if [ "$$(uname -s)" = Linux ]; then $(MAKE) --no-print-directory $(COMPILERS)/.ready; \
	else echo "the compilers for TPUs and GPUs are there for Linux alone: the tests that need them are skipped"; fi

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile setup.py --extra test --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --custom-compile-command "make lock" --quiet -o requirements.txt
	$(VENV)-lock/bin/uv pip compile setup.py --extra tpu --universal --python-version 3.11 --generate-hashes \
	  --constraint requirements.txt --no-annotate --custom-compile-command "make lock" --quiet -o requirements-tpu.txt
	$(VENV)-lock/bin/uv pip compile benchmarks/environments/compilers.in --no-deps --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --custom-compile-command "make lock" --quiet -o benchmarks/environments/compilers.txt

clean:
	rm -rf $(VENV) $(VENV)-lock *.egg-info
