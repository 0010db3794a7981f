#!/usr/bin/env bash
# Every training behind docs/results/distilled.md, then the tables: benchmarks/builtin_distilled.sh RUNS
# About three hours on two CPU cores. A run that is finished, or was stopped, is gone on with.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:?usage: benchmarks/builtin_distilled.sh RUNS}
bin=${BIN:-.venv/bin}

train() { # name, then the options of hypersd-train distill
  local name=$1
  shift
  "$bin/hypersd-train" distill --recipe builtin --out "$runs/$name" --set data.cache="$runs/cache" --set log_with=none "$@"
}

# Everybody's last step count has 1,000 student updates; k = 8, 4, 2 have 100, 200, 400, earlier stages included.
train tscd-s0 --method tscd --set stages.1.w_adv=0.02 --set stages.2.w_adv=0.05 --set stages.3.w_adv=0.1
train tscd-noadv-s0 --method tscd # these are the LoRAs that ship
train pcm8-s0 --method pcm --set stages.0.segments=8 --set stages.0.steps=100
train pcm4-s0 --method pcm --set stages.0.steps=200
train pcm2-s0 --method pcm --set stages.0.segments=2 --set stages.0.points=8 --set stages.0.steps=400
train pcm1-s0 --method pcm --set stages.0.segments=1 --set stages.0.points=8
train tcd-s0 --method tcd
train lcm-s0 --method lcm

"$bin/python" -m benchmarks.distilled --bf16 --contestants benchmarks/builtin_distilled.json --runs "$runs"
