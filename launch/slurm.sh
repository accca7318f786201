#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, with one process per GPU.
#
#   sbatch --nodes=4 launch/slurm.sh CONFIG WORKDIR [FLAG ...]
#   launch/slurm.sh CONFIG WORKDIR [FLAG ...] --dry-run
#
# Submit from the project's folder. A job stopped by its time limit or by pre-emption saves and requeues itself; one
# that fails is retried (RETRIES, BACKOFF), and requeued if a node is lost. For nodes that do not have eight GPUs, give
# both --ntasks-per-node and --gpus-per-node. SIGTERM comes half an hour before the time limit; change this with
# --signal=B:TERM@SECONDS, leaving enough time for an update and a checkpoint.
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
# No CPU binding: each process's data readers need more than the single core that a task gets by default.
command=(srun --unbuffered --cpu-bind=none launch/run.sh "${ARGUMENTS[@]}")
if [[ -n $DRY_RUN ]]; then
  run "${command[@]}"
  exit
fi

share_secret
status=0
run_and_forward "${command[@]}" || status=$?
if ((status == 0)) && [[ ! -e ${ARGUMENTS[1]}/model/model_index.json ]]; then
  echo "stopped before the end of the run; requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
