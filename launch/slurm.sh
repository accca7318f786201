#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, with one process for each GPU.
#
#   sbatch --nodes=4 launch/slurm.sh CONFIG WORKDIR [FLAG ...]
#   launch/slurm.sh CONFIG WORKDIR [FLAG ...] --dry-run
#
# Submit from the project's folder. A job that its time limit or a pre-emption stops has saved, and queues again by
# itself; one that fails is tried again (RETRIES, BACKOFF), and queued again if a node is lost. For nodes of another
# number of GPUs give both --ntasks-per-node and --gpus-per-node, and for another time between SIGTERM and the time
# limit than half an hour --signal=B:TERM@SECONDS: long enough for an update and a checkpoint.
#SBATCH --job-name=vpae
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:TERM@1800
set -euo pipefail
# SLURM runs a copy of this file, from elsewhere.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# shellcheck source=launch/common.sh
source launch/common.sh
parse "$@"
((${#ARGUMENTS[@]} >= 2)) || fail "usage: sbatch --nodes=N launch/slurm.sh CONFIG WORKDIR [FLAG ...]"
# Unbound, since each process's readers of data need more than the one core that is a task's by default.
command=(srun --unbuffered --cpu-bind=none launch/run.sh "${ARGUMENTS[@]}")
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
