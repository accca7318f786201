#!/usr/bin/env bash
# Trains on GPU nodes under SLURM: one process a node, which has all of its GPUs.
#
#   sbatch --nodes=4 launch/slurm.sh CONFIG WORKDIR [FLAG ...]
#   launch/slurm.sh CONFIG WORKDIR [FLAG ...] --dry-run
#
# Submit from the project's folder. A job that its time limit or a pre-emption stops has saved, and queues again by
# itself; one that fails is tried again (RETRIES, BACKOFF), and queued again if a node is lost. For one process a GPU
# give --ntasks-per-node=8.
#SBATCH --job-name=vpae
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:TERM@300
set -euo pipefail
# SLURM runs a copy of this file, from elsewhere.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# shellcheck source=launch/common.sh
source launch/common.sh
parse "$@"
((${#ARGUMENTS[@]} >= 2)) || fail "usage: sbatch --nodes=N launch/slurm.sh CONFIG WORKDIR [FLAG ...]"
command=(srun --unbuffered launch/run.sh "${ARGUMENTS[@]}")
if [[ -n $DRY_RUN ]]; then
  run "${command[@]}"
  exit
fi

share_secret
status=0
run_and_forward "${command[@]}" || status=$?
if ((status == 0)) && [[ ! -e ${ARGUMENTS[1]}/model/model_index.json ]]; then
  echo "stopped before its end; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
