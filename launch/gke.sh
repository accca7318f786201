#!/usr/bin/env bash
# Trains on a Kubernetes cluster with JobSet, on TPUs or GPUs: fills in launch/gke/KIND.yaml and applies it.
#
#   IMAGE=REGISTRY/vpae_jax launch/gke.sh tpu|gpu CONFIG WORKDIR [FLAG ...] [--dry-run]
#
# Reads NAME (vpae); IMAGE: a container image with this project in its working directory and its packages installed;
# VOLUME (vpae-data): a persistent volume claim that all hosts can write to, mounted as /data; HOSTS (16 for tpu, 2 for
# gpu); GRACE (1800): seconds from SIGTERM to the end of a pod, enough for an update and a checkpoint.
# For tpu: ACCELERATOR (tpu-v5p-slice), TOPOLOGY (4x4x4), CHIPS (4) per host. For gpu: ACCELERATOR (nvidia-h100-80gb),
# GPUS (8) per host, one process for each, and XLA_FLAGS.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
parse "$@"
((${#ARGUMENTS[@]} >= 3)) || fail "usage: IMAGE=IMAGE launch/gke.sh tpu|gpu CONFIG WORKDIR [FLAG ...] [--dry-run]"
kind=${ARGUMENTS[0]}
[[ -n ${IMAGE:-} ]] || fail "set IMAGE to a container image of this project"
case $kind in
  tpu) hosts=16 accelerator=tpu-v5p-slice ;;
  gpu) hosts=2 accelerator=nvidia-h100-80gb ;;
  *) fail "'$kind' is not tpu or gpu" ;;
esac

# The arguments as a YAML list, each in single quotes.
list=""
for argument in "${ARGUMENTS[@]:1}"; do list+="${list:+, }'${argument//\'/\'\'}'"; done
manifest=$(<"launch/gke/$kind.yaml")
fill() { manifest=${manifest//"<$1>"/$2}; }
fill NAME "${NAME:-vpae}"
fill IMAGE "$IMAGE"
fill VOLUME "${VOLUME:-vpae-data}"
fill HOSTS "${HOSTS:-$hosts}"
fill ACCELERATOR "${ACCELERATOR:-$accelerator}"
fill TOPOLOGY "${TOPOLOGY:-4x4x4}"
fill CHIPS "${CHIPS:-4}"
fill GPUS "${GPUS:-8}"
fill GRACE "${GRACE:-1800}"
fill XLA_FLAGS "${XLA_FLAGS:-}"
share_secret
fill SECRET "$VPAE_SECRET"
fill ARGUMENTS "$list"
if [[ -n $DRY_RUN ]]; then
  echo "# kubectl apply --filename=-"
  echo "$manifest"
else
  kubectl apply --filename=- <<<"$manifest"
fi
