#!/usr/bin/env bash
# Trains on this host and retries after a failure; all launchers end by running this.
#
#   launch/run.sh CONFIG WORKDIR [FLAG ...] [--dry-run]
#
# Reads PYTHON (python), RETRIES and BACKOFF (see common.sh), and UNFINISHED (0): the exit status of a run stopped by
# SIGTERM, for schedulers that treat 0 as "finished". The process index comes from the environment (distributed.py).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
parse "$@"
((${#ARGUMENTS[@]} >= 2)) || fail "usage: launch/run.sh CONFIG WORKDIR [FLAG ...] [--dry-run]"
config=${ARGUMENTS[0]} workdir=${ARGUMENTS[1]}
command=("${PYTHON:-python}" -m vpae_jax.main "--config=$config" "--workdir=$workdir" "${ARGUMENTS[@]:2}")
if [[ -n $DRY_RUN ]]; then
  run "${command[@]}"
  exit
fi

# Every process has its own log; its lines in the combined output are prefixed with its number.
process=${JAX_PROCESS_ID:-${SLURM_PROCID:-${TPU_WORKER_ID:-$(hostname)}}}
mkdir -p "$workdir/logs"
exec > >(trap '' TERM INT; tee -a "$workdir/logs/process-$process.log" | sed -u "s/^/[$process] /") 2>&1
logger=$!
status=0
retry "${command[@]}" || status=$?
if ((status == 0)) && [[ ! -e $workdir/model/model_index.json ]]; then status=${UNFINISHED:-0}; fi
exec >&- 2>&-
wait "$logger" || true # until the last line is written
exit "$status"
