#!/usr/bin/env bash
# Trains on this host, with one process for all of its GPUs, or several.
#
#   launch/local.sh CONFIG WORKDIR [FLAG ...] [--dry-run]
#
# Reads PROCESSES (1), GPUS (all that nvidia-smi lists; shared out evenly if there are several processes) and PORT. As
# one of several hosts, each of which runs it: HOSTS (1), HOST (which of them this is, from 0), COORDINATOR (the address
# of the first one) and the same VPAE_SECRET.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
parse "$@"
((${#ARGUMENTS[@]} >= 2)) || fail "usage: launch/local.sh CONFIG WORKDIR [FLAG ...] [--dry-run]"
processes=${PROCESSES:-1}
hosts=${HOSTS:-1} host=${HOST:-0}
if ((processes * hosts == 1)); then
  exec launch/run.sh "${ARGUMENTS[@]}" ${DRY_RUN:+--dry-run}
fi

gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
((gpus % processes == 0)) || fail "GPUS is $gpus, expected a multiple of PROCESSES ($processes)"
each=$((gpus / processes))
share_secret
children=()
for ((i = 0; i < processes; i++)); do
  settings=(
    "JAX_COORDINATOR_ADDRESS=${COORDINATOR:-localhost}:${PORT:-12355}"
    "JAX_NUM_PROCESSES=$((hosts * processes))"
    "JAX_PROCESS_ID=$((host * processes + i))"
  )
  if ((each)); then settings+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * each)) $((i * each + each - 1)))"); fi
  if [[ -n $DRY_RUN ]]; then
    run env "${settings[@]}" launch/run.sh "${ARGUMENTS[@]}"
  else
    env "${settings[@]}" launch/run.sh "${ARGUMENTS[@]}" &
    children+=($!)
  fi
done
[[ -z $DRY_RUN ]] || exit 0

trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT
status=0
for child in "${children[@]}"; do
  while true; do
    ended=0
    wait "$child" || ended=$?
    kill -0 "$child" 2>/dev/null || break
  done
  # Bad input of one of them is the job's, whatever that did to the others.
  ((ended == 0 || status == 2)) || status=$ended
done
exit "$status"
