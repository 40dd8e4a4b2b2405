#!/usr/bin/env bash
# Finetunes Wan2.1 1.3B on 8 GPUs, each with the whole model: 49 GB of each GPU, 91 GB of disk.
# Clips first: python prepare.py --videos=DIR --codec=wan --vae=$WAN --text=$WAN --out=data/wan
# What adds up to that, without a GPU: LAUNCH=python recipes/train_1.3b.sh --dry_run 8 80
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-T2V-1.3B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} train.py --model=wan-1.3b \
    --init="$WAN" --vae="$WAN" --data=data/wan --out=out/wan-1.3b "$@"
