#!/bin/sh
# The startup script of the VMs that podlaunch creates, run by Google's agent as root.
#
# It sets what TPUs from v5e on want of the kernel. Then, on the first VM of each slice, it waits for signs of life:
# the agent of a running worker, and each launcher that connects, renew the file $ALIVE. Where nothing has renewed it
# for as long as the metadata says, nobody uses the slice, and this VM deletes it. Tests set the variables.
set -u
metadata=${METADATA:-http://metadata.google.internal}/computeMetadata/v1/instance
api=${TPU_API:-https://tpu.googleapis.com}/v2
alive=${ALIVE:-/run/podlaunch/alive}
hugepages=${HUGEPAGES:-/sys/kernel/mm/transparent_hugepage/enabled}
step=10  # seconds between two looks
again=60 # seconds between two deletions
max_tries=${MAX_TRIES:-30}

get() { curl -fsS --retry 5 --retry-delay 1 --retry-connrefused --max-time 30 -H 'Metadata-Flavor: Google' "$metadata/$1"; }

case $(get attributes/accelerator-type) in
  v[234]-*) ;;
  *) echo always >"$hugepages" || echo "podlaunch: $hugepages is left as it is" ;;
esac

idle=$(get attributes/podlaunch-idle-seconds) || exit 0 # never
resource=$(get attributes/podlaunch-resource) || exit 0
[ "$(get attributes/agent-worker-number)" = 0 ] || exit 0

# In a folder that only root can write, so that the file cannot be a link; workers are not root.
mkdir -p "$(dirname "$alive")" && : >"$alive" && chmod 666 "$alive"

# Counted in looks rather than by the clock, which may be set while the VM starts.
wait_until_idle() {
  waited=0
  while [ "$waited" -lt "$limit" ]; do
    sleep "$step"
    waited=$((waited + step))
    now=$(stat -c %y "$alive")
    if [ "$now" != "$seen" ]; then
      seen=$now waited=0 limit=$idle tries=0
    fi
  done
}

# The token goes through a pipe, since all users see command lines.
delete() {
  token=$(get service-accounts/default/token | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')
  printf 'header = "Authorization: Bearer %s"\n' "$token" |
    curl -sS -o /dev/null -w '%{http_code}' --max-time 60 --config - -X DELETE "$api/$resource?force=true"
}

seen=$(stat -c %y "$alive") limit=$idle tries=0
while [ "$tries" -lt "$max_tries" ]; do
  wait_until_idle
  tries=$((tries + 1)) limit=$again
  echo "podlaunch: idle for $idle s, deleting $resource: HTTP $(delete)"
done
echo "podlaunch: $resource cannot be deleted; it may cost money until somebody else deletes it"
${POWEROFF:-poweroff}
