#!/usr/bin/env bash
# Trains on this host, with one process for all of its GPUs or with several processes.
#
#   launch/local.sh CONFIG WORKDIR [FLAG ...] [--dry-run]
#
# Reads PROCESSES (1), GPUS (all that nvidia-smi lists; divided evenly among several processes) and PORT. On several
# hosts, run it on each with HOSTS (1), HOST (the index of this host, from 0), COORDINATOR (the address of the first
# host) and the same VPAE_SECRET.
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
  # If one process reports bad input, that is the job's status, whatever became of the others.
  ((ended == 0 || status == 2)) || status=$ended
done
exit "$status"
