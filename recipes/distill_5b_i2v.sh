#!/usr/bin/env bash
# Distils what train_5b_i2v.sh makes to 4 steps, with first frames given to half of the clips, on 8 GPUs: 50 GB of each,
# 280 GB of disk. LAUNCH=python recipes/distill_5b_i2v.sh --dry_run 8 80 prints what adds up to that.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.2-TI2V-5B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} distill.py --model=wan2.2-5b --first_frame=.5 \
    --teacher=out/wan-5b --vae="$WAN" --data=data/wan-5b --out=out/few-5b --shard=-1 --sp=4 --keep=1 "$@"
