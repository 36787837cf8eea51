#!/bin/sh
# On a TPU VM: `environment.sh FOLDER` builds a Python environment with the packages of the lock file below
# FOLDER, once for each lock file, and prints the path of its Python. `launch` runs it over ssh.
set -eu
code=$(cd "$(dirname "$0")/../.." && pwd)
lock=$code/requirements-tpu.txt
# Named after the lock file, so that other code with other packages gets an environment of its own.
environment=$1/$(sha256sum "$lock" | cut -c1-16)
python=$environment/bin/python

# .ready is written last: without it the environment is incomplete, and is built again.
if [ ! -e "$environment/.ready" ]; then
  {
    mkdir -p "$1"
    rm -rf "$environment"
    for version in 3.13 3.12 3.11; do
      if "python$version" -c 'import ensurepip, venv' 2>/dev/null; then
        "python$version" -m venv "$environment"
        "$python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"
        touch "$environment/.ready"
        break
      fi
    done
    # The VM's own Python may be older than 3.11; uv downloads a newer one.
    if [ ! -e "$environment/.ready" ]; then
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --python 3.12 "$environment"
      python3 -m uv pip install --quiet --python "$python" --require-hashes -r "$lock"
      touch "$environment/.ready"
    fi
  } >&2 # standard output is the path alone
fi
echo "$python"
