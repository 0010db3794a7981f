#!/usr/bin/env bash
# Every training behind docs/results/distilled.md, then the tables: benchmarks/builtin_distilled.sh RUNS
# About four hours on two CPU cores. A run that is finished, or was stopped, is gone on with; two copies of this script
# with OMP_NUM_THREADS=1 may share the work if they are given different parts of the list.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:?usage: benchmarks/builtin_distilled.sh RUNS}
bin=${BIN:-.venv/bin}

train() { # name, then the options of hypersd-train distill
  local name=$1
  shift
  "$bin/hypersd-train" distill --recipe builtin --out "$runs/$name" --set data.cache="$runs/cache" --set log_with=none "$@"
}

# Everybody's last step count has 1,000 student updates; k = 8, 4, 2 have 150, 300, 600, earlier stages included.
for seed in 0 1 2; do
  train "tscd-s$seed" --method tscd --set "seed=$seed"
  train "pcm4-s$seed" --method pcm --set "seed=$seed" --set stages.0.steps=300
done
train tscd-noadv-s0 --method tscd --set stages.1.w_adv=0 --set stages.2.w_adv=0 --set stages.3.w_adv=0
train pcm8-s0 --method pcm --set stages.0.segments=8 --set stages.0.steps=150
train pcm2-s0 --method pcm --set stages.0.segments=2 --set stages.0.points=8 --set stages.0.steps=600
train pcm1-s0 --method pcm --set stages.0.segments=1 --set stages.0.points=8
train tcd-s0 --method tcd
train lcm-s0 --method lcm

# What the critic sees as real in the last stage: tscd-s0 has data.
last='stages=[{"segments": 1, "points": 8, "steps": 400, "lr": 5e-4, "w_mse": 1.0, "w_adv": 0.05}]'
for real in target teacher_multistep; do
  train "real-$real" --method tscd --set "$last" --set init_lora="$runs/tscd-s0/stage3-k2-lora.safetensors" \
    --set "adversarial.real=$real"
done

"$bin/python" -m benchmarks.distilled --contestants benchmarks/builtin_distilled.json --runs "$runs"
