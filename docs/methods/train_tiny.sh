#!/usr/bin/env bash
# Trains the tiny config of every method for a few minutes and scores the students: the table of
# docs/methods/tiny_results.md. Takes about an hour and a half on one core.
#
#   docs/methods/train_tiny.sh RUNS
set -euo pipefail
runs=$1
mkdir -p "$runs"
rows=()

# train NAME CONFIG STEPS [OVERRIDE ...]: a run in RUNS/NAME, where the runs that start from it find it.
train() {
    python -m vpae_jax.main --config="configs/$2.py" --config.method.ema=0.98 --config.data.clips=2048 \
        --config.sample_every=0 --config.checkpoint_every=100 --config.guard.enabled=False --config.steps="$3" "${@:4}" \
        --workdir="$runs/$1"
    rows+=("--compare=$1=$runs/$1/model")
}

train lcm lcm 300 --config.method.distance=squared
train apt apt 200 --config.previous.workdir="$runs/lcm"
train pcm pcm 200
train pcm1 pcm 200 --config.method.phases=1
train dcm_semantic dcm_semantic 200
train dcm_detail dcm_detail 200
train add add 200 --config.method.early_steps=30
train add1 add 200 --config.method.steps=1
train magic magic 200
train dmd2 dmd2 200
train dmd2_1 dmd2 200 --config.method.steps=1
train aad_init dmd2 100 --config.method.steps=1 --config.method.adversarial_weight=0 --config.method.disc_weight=0
train aad aad 200
train pose1 pose1 200
train pose2 pose2 200

# Knowledge distillation needs clips that the teacher has generated from known noise.
python -c '
from vpae_jax.tasks.digits.clips import MovingDigits
clips = MovingDigits("train", 400)
print(*(clips[i]["caption"] for i in range(400)), sep="\n")' > "$runs/captions.txt"
python -m vpae_jax.encode --captions="$runs/captions.txt" --guidance=3 --steps=20 --batch=8 --output="$runs/pairs"
train kd kd 300 --config.data.records="$runs/pairs"
train dmd2v dmd2v 200

python -m vpae_jax.evaluate --model=tiny --task=digits --steps=1 --guidance=1 "${rows[@]}" \
    --compare="lcm_in_one=$runs/lcm/model:1:1" --count=64 --output="$runs/scores"
