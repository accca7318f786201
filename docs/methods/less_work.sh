#!/usr/bin/env bash
# Measures the effect on quality of the options in docs/methods/less_work.md: both phases of the tiny model with each
# option off and on, over seeds, and the kernel distances of their students. Existing runs are reused.
#
#   docs/methods/less_work.sh RUNS [SEED ...]
set -euo pipefail
runs=$1
seeds=(0 1 2)
[ $# -gt 1 ] && seeds=("${@:2}")
mkdir -p "$runs"
rows=()

# train NAME CONFIG STEPS [OVERRIDE ...]: a run in RUNS/NAME. All runs of a seed see the same clips and start alike.
train() {
    [ -d "$runs/$1/model" ] || python -m vpae_jax.main --config="configs/$2.py" --config.method.ema=0.98 \
        --config.batch_size=8 --config.data.clips=1024 --config.log_every=10 --config.sample_every=0 \
        --config.score_every=0 --config.checkpoint_every=100 --config.guard.enabled=False --config.steps="$3" "${@:4}" \
        --workdir="$runs/$1"
    rows+=("--compare=$1=$runs/$1/model")
}

for seed in "${seeds[@]}"; do
    train "one_$seed" phase1 200 --config.seed="$seed" --config.method.fake_updates=5
    train "one_clips_$seed" phase1 200 --config.seed="$seed" --config.method.fake_updates=5 --config.method.clips=generator
    # Phase two starts from the same student, whatever its options.
    from=(--config.seed="$seed" --config.previous.workdir="$runs/one_$seed" --config.method.disc_warmup=20)
    train "two_$seed" phase2 150 "${from[@]}"
    train "two_clips_$seed" phase2 150 "${from[@]}" --config.method.clips=generator
    train "two_penalty4_$seed" phase2 150 "${from[@]}" --config.method.penalty.every=4
    train "two_csds2_$seed" phase2 150 "${from[@]}" --config.method.csds.every=2
done

python -m vpae_jax.evaluate --model=tiny --task=digits --steps=1 --guidance=1 "${rows[@]}" --count=128 \
    --output="$runs/scores"
