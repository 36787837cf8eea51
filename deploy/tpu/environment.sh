#!/bin/sh
# On a TPU VM: `environment.sh FOLDER [ADDRESS]` builds a Python environment below FOLDER, once for each lock file:
# the interpreter that interpreter.json pins, from ADDRESS or from where the pin says, and the packages of the lock
# file. Prints the path of its Python. `launch` runs it over ssh, again after a lost connection.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
lock=$here/../../requirements-tpu.txt
# Named after what it is made of, so that other code with other packages gets an environment of its own. The name is a
# link that is made when all behind it is complete; a venv cannot be moved, so it is built where it stays.
environment=$1/$(cat "$lock" "$here/interpreter.json" | sha256sum | cut -c1-16)
build=$environment.$$

if [ ! -e "$environment" ]; then
  {
    mkdir -p "$1"
    # What this starts inherits the lock: after a kill, the next call waits for pip to end.
    exec 9>"$1/.lock"
    flock --nonblock 9 || { echo "waiting for another call that builds it" && flock 9; }
    if [ ! -e "$environment" ]; then
      rm -rf "$environment".* # of calls that were killed
      mkdir "$build"
      # -I: neither the folder nor variables of the user decide what is imported.
      python3 -I "$here/interpreter.py" "$build/interpreter" "${2:-}"
      "$build/interpreter/bin/python3" -I -m venv "$build"
      "$build/bin/python" -I -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"
      ln -sfn "${build##*/}" "$environment"
    fi
  } >&2 # standard output is the path alone
fi
echo "$environment/bin/python"
