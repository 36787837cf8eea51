# Each target does all its own set-up; .ci/run calls those of `make test` one by one, to time them.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
TESTBED = slurm-wlm munge openssh-server iproute2

.PHONY: help install quickstart test test-fast test-client test-clusters testbed check format lock clean

help:
	@echo "make install      the packages, in $(VENV)"
	@echo "make quickstart   train a ResNet here and now, on two processes"
	@echo "make test         checks, then all tests"
	@echo "make test-fast    the tests that start no processes"
	@echo "make test-client  of these, what a laptop needs, on macOS too"
	@echo "make test-clusters  those that do: runs here, on SLURM and on TPU slices that they raise"
	@echo "make testbed      install SLURM and sshd for the tests, where that is possible"
	@echo "make check        ruff, mypy, the import rules"
	@echo "make format       let ruff format the code"
	@echo "make lock         resolve requirements.txt and requirements-tpu.txt anew"

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

test: install check testbed test-fast test-clusters

test-fast: $(READY)
	$(BIN)/pytest -m "not cluster" --numprocesses 2 --dist worksteal

# They wait much, so more of them than there are cores; the tests of a file share what they have raised and trained.
test-clusters: $(READY) testbed
	$(BIN)/pytest -m cluster --numprocesses 3 --dist loadfile

# What runs where the user types. Marked linux is what hosts run: it reads /proc.
test-client: $(READY)
	$(BIN)/pytest -m "not cluster and not linux" --numprocesses 2 tests/configs tests/launcher tests/test_packaging.py

# The tests raise clusters of their own; policy-rc.d keeps the installation from starting services. Without
# the programs they skip, and say so.
testbed:
	@absent=$$(for program in slurmctld munged sshd ip; do command -v $$program >/dev/null || echo $$program; done); \
	if [ -z "$$absent" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  policy=/usr/sbin/policy-rc.d; \
	  if [ ! -e $$policy ]; then \
	    trap "rm -f $$policy" EXIT INT TERM; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod +x $$policy; \
	  fi; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(TESTBED) >/dev/null; \
	else echo "not installed:" $$absent "(Debian: apt-get install $(TESTBED)): the tests that need them are skipped"; fi

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

clean:
	rm -rf $(VENV) $(VENV)-lock *.egg-info
