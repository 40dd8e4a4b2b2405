#!/usr/bin/env bash
# Makes Wan2.1 1.3B causal by diffusion forcing, in chunks of 3 latent frames (9 pixel frames, then 12), before
# recipes/streaming_1.3b.sh. 8 GPUs: 49 GB of each, 91 GB of disk. Clips as for recipes/train_1.3b.sh.
# LAUNCH=python recipes/causal_1.3b.sh --dry_run 8 80 prints what adds up to that.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-T2V-1.3B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} train.py --model=wan-1.3b \
    --init="$WAN" --vae="$WAN" --data=data/wan --out=out/causal-1.3b --window -9 1 1 --tile 3 99 99 \
    --clean_prefix=0.25 "$@"
