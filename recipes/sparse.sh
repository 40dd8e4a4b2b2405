#!/usr/bin/env bash
# Teaches Wan2.1 1.3B sliding-tile attention: from dense to 3 x 3 x 3 tiles in 1000 updates, 91 % of the pairs left out.
# 8 GPUs: 49 GB of each, 91 GB of disk. LAUNCH=python recipes/sparse.sh --dry_run 8 80 prints what adds up to that.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-T2V-1.3B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} train.py --model=wan-1.3b \
    --init="$WAN" --vae="$WAN" --data=data/wan --out=out/sparse --window 3 3 3 --tile 4 4 8 --window_steps=1000 \
    --steps=2000 "$@"
