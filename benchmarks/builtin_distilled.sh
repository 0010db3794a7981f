#!/usr/bin/env bash
# Every training behind docs/results/distilled.md, then the tables: benchmarks/builtin_distilled.sh RUNS
# About five hours on two CPU cores. A run that is finished, or was stopped, is gone on with.
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
train tscd-adv-s0 --method tscd --set adversarial.real=teacher_multistep \
  --set stages.1.w_adv=0.005 --set stages.2.w_adv=0.01 --set stages.3.w_adv=0.02
train tscd-edge07-s0 --method tscd --set edge_share=0.7
train pcm8-s0 --method pcm --set stages.0.segments=8 --set stages.0.steps=100
train pcm2-s0 --method pcm --set stages.0.segments=2 --set stages.0.points=8 --set stages.0.steps=400
train tcd-s0 --method tcd
train lcm-s0 --method lcm
for seed in 0 1 2; do # the LoRAs that ship are those of tscd-s0
  train "tscd-s$seed" --method tscd --set seed="$seed"
  train "pcm4-s$seed" --method pcm --set stages.0.steps=200 --set seed="$seed"
  train "pcm1-s$seed" --method pcm --set stages.0.segments=1 --set stages.0.points=8 --set seed="$seed"
done

# The critic's real samples: the last stage alone, thrice, from one and the same stage before it.
for real in target teacher_multistep data; do
  train "real-$real" --method tscd --set edge_share=0.7 --set adversarial.real="$real" \
    --set init_lora="$runs/tscd-edge07-s0/stage3-k2-lora.safetensors" \
    --set 'stages=[{"segments":1,"points":8,"steps":600,"lr":5e-4,"w_mse":1.0,"w_adv":0.02}]'
done

"$bin/python" -m benchmarks.distilled --bf16 --contestants benchmarks/builtin_distilled.json --runs "$runs"
