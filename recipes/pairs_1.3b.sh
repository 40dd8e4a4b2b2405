#!/usr/bin/env bash
# Distils Wan2.1 1.3B to 4 steps, first by 4,000 pairs (noise, clip) that the unguided teacher makes, then by DMD2 beside
# them, from prompts alone, on 8 GPUs: 68 GB of each, 243 GB of disk, 84 of which are pairs and their texts.
# Prompts first: python prepare.py --prompts=FILE --shape 16 21 60 104 --codec=wan --vae=$WAN --text=$WAN --out=data/wan
# LAUNCH=python recipes/pairs_1.3b.sh --dry_run 8 80 prints the sum, and what it takes to make the pairs
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-T2V-1.3B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} distill.py --model=wan-1.3b --pairs=4000 \
    --teacher="$WAN" --vae="$WAN" --data=data/wan --out=out/pairs-1.3b --shard=-1 --micro_batch=2 "$@"
