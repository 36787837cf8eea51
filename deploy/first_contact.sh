#!/usr/bin/env bash
# The first run on a cluster of yours, in ten minutes: trains, stops, resumes, and prints a table to send back.
#
#   deploy/first_contact.sh slurm-2x8
#   deploy/first_contact.sh tpu-v4-16 --root gs://my-bucket/runs
#
# The arguments are a cluster of `launch`, and options of `launch` for every run. On Cloud TPU a slice is created,
# which costs money, and deleted at the end. FIRST_CONTACT_RECIPE and FIRST_CONTACT_BATCH (images a device) replace
# r50 and 128. Everything that is printed is also in the folder that the last line names.
set -o pipefail # without -u, of which macOS's bash 3.2 has empty arrays fail

if [ $# -eq 0 ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
fi
cluster=$1
shift
options=("$@")
root=() # of those options, what the commands that look at a run take
for ((i = 0; i < $#; i++)); do
  case ${options[i]} in
  --root) root=(--root "${options[i + 1]-}") ;;
  --root=*) root=("${options[i]}") ;;
  esac
done
recipe=${FIRST_CONTACT_RECIPE:-r50}
batch=${FIRST_CONTACT_BATCH:-128}
name=first-contact-$(date +%Y%m%d-%H%M%S)
logs=$(mktemp -d "./$name.XXXX")
case $cluster in
tpu-*) created=(--yes --keep) ;; # all runs use one slice
*) created=() ;;
esac

settings=( # no data is read, and the evaluation at the end is short
  data.source=synthetic data.train.num_examples=1000000 data.eval.num_examples=1000
  schedule.warmup_epochs=0 train.eval_every_epochs=null log.every_steps=10 log.num_images=0
)

rows=()
row() { # row CHECK RESULT SECONDS DETAIL
  rows+=("| $1 | $2 | $3 | ${4//|//} |")
  printf '%-34s %-7s %6s  %s\n' "$@"
}

check() { # check NAME EXPECTED_CODE COMMAND...: runs it; its output goes to a file, its last line into the table
  local what=$1 expected=$2 file code begun=$SECONDS
  file=$logs/$(printf '%02d' "${#rows[@]}").log
  shift 2
  printf '%s …\r' "$what" >&2
  "$@" >"$file" 2>&1 </dev/null
  code=$?
  if [ "$code" = "$expected" ]; then result=ok; else result="code $code"; fi
  row "$what" "$result" "$((SECONDS - begun))" "$(detail "$file")"
  [ "$code" = "$expected" ]
}

detail() { # what matters of an output: an error, a result, or the last line
  local found
  found=$(grep -aE '^(error:|cause |completed |stopped |devices )|^step .*images/s' "$1" | tail -n 1)
  [ -n "$found" ] || found=$(grep -am 1 '[^[:space:]]' "$1")
  printf '%.160s' "$found"
}

train() { # train STEPS: the run, to that many steps
  launch run "$recipe" --cluster "$cluster" --name "$name" "${options[@]}" "${created[@]}" \
    "${settings[@]}" train.steps="$1" train.batch_size="$global_batch"
}

stop_while_it_trains() { # exits as `launch` does: with 130, once it is saved
  train 1000000 &
  local training=$!
  for _ in $(seq 600); do
    if launch status "$name" "${root[@]}" 2>/dev/null | grep ' ago, training' >/dev/null; then break; fi
    kill -0 $training 2>/dev/null || break
    sleep 1
  done
  launch stop "$name" "${root[@]}"
  wait $training
}

speed() { launch status "$name" "${root[@]}" | sed -n 's/^progress *//p'; }

versions() {
  "$(dirname "$(command -v launch)")/python" -c '
from importlib.metadata import version
print(", ".join(f"{p} {version(p)}" for p in ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")))'
}

end() { # also after Ctrl-C: a slice costs money
  local slice
  slice=$(grep -aohE 'podlaunch-first-contact[a-z0-9-]*' "$logs"/*.log | head -n 1)
  if [ -n "$slice" ]; then
    check "the slice is deleted" 0 launch gc --delete "$slice" --yes
  fi
  {
    echo "| check | result | seconds | detail |"
    echo "| --- | --- | --- | --- |"
    printf '%s\n' "${rows[@]}"
  } >"$logs/table.md"
  echo
  cat "$logs/table.md"
  echo "Send back $logs/table.md. Its folder has the output of each check."
  if grep -qE '\| (code [0-9]+|failed) \|' "$logs/table.md"; then exit 1; fi
}
trap end EXIT
trap 'exit 130' INT TERM

check "launch and its packages" 0 versions
if [[ $cluster == tpu-* ]]; then
  check "ssh" 0 ssh -V
elif [[ $cluster != local* ]]; then
  check "SLURM" 0 sinfo --version
fi
if command -v nvidia-smi >/dev/null; then
  check "GPUs here" 0 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
fi
devices=$(launch plan "$recipe" --cluster "$cluster" "${options[@]}" "${settings[@]}" --json 2>"$logs/plan.log" |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["devices"])' 2>/dev/null)
global_batch=$((${devices:-0} * batch))
if [ "$global_batch" -gt 0 ]; then
  row "plan" ok 0 "$devices devices, $global_batch images a step"
  if check "trains from nothing" 0 train 40; then
    check "what jax saw" 0 launch status "$name" "${root[@]}"
    check "resumes from its checkpoint" 0 train 80
    check "stops and saves when asked" 130 stop_while_it_trains
    check "images a second" 0 speed
  fi
else
  row "plan" failed 0 "$(detail "$logs/plan.log")"
fi
