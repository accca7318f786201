#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU pod slice.
#
#   TPU=NAME ZONE=us-east5-a launch/tpu_pod.sh CONFIG WORKDIR [FLAG ...] [--dry-run]
#
# Reads TPU, ZONE, PROJECT (gcloud's default), FOLDER (vpae_jax): the project's folder on every worker, and RETRIES and
# BACKOFF, for each worker and for the connection. WORKDIR must be on a disk that all workers mount.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
parse "$@"
[[ -n ${TPU:-} && -n ${ZONE:-} ]] || fail "set TPU to the slice's name and ZONE to its zone"
((${#ARGUMENTS[@]} >= 2)) || fail "usage: TPU=NAME ZONE=ZONE launch/tpu_pod.sh CONFIG WORKDIR [FLAG ...] [--dry-run]"
settings=("RETRIES=${RETRIES:-5}" "BACKOFF=${BACKOFF:-10}" "PYTHON=${PYTHON:-python}")
remote="cd $(printf '%q' "${FOLDER:-vpae_jax}") && $(printf '%q ' "${settings[@]}" launch/run.sh "${ARGUMENTS[@]}")--detect_cluster"
command=(gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --worker=all "--command=$remote")
if [[ -n $DRY_RUN ]]; then run "${command[@]}"; else retry "${command[@]}"; fi
