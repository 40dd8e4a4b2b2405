#!/usr/bin/env bash
# Finetunes Wan2.2 5B to go on from a given first frame, half of the clips, on 8 GPUs: 39 GB of each, 160 GB of disk.
# LAUNCH=python recipes/train_5b_i2v.sh --dry_run 8 80 prints what adds up to that. The dataset is of its own VAE (48
# channels): python prepare.py --videos=DIR --codec=wan --vae=$WAN --text=$WAN --sizes 704x1280 --frames=121 --fps=24
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.2-TI2V-5B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} train.py --model=wan2.2-5b --first_frame=.5 \
    --init="$WAN" --vae="$WAN" --data=data/wan-5b --out=out/wan-5b --shard=-1 --sp=4 --keep=1 "$@"
