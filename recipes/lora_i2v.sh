#!/usr/bin/env bash
# A LoRA of Wan2.1 14B image-to-video on one GPU of 141 GB: 117 GB of it, 11 GB of disk.
# LAUNCH=python recipes/lora_i2v.sh --dry_run 1 141 prints what adds up to that. Before, the clips and what the model is
# shown: python prepare.py --videos=DIR --image --codec=wan --vae=$WAN --text=$WAN --clip=$WAN --out=data/i2v
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-I2V-14B-480P-Diffusers}
${LAUNCH:-python} train.py --model=wan-14b-i2v --init="$WAN" --vae="$WAN" --data=data/i2v --out=out/lora-i2v \
    --lora_rank=32 --lr=1e-4 --steps=2000 --batch=8 "$@"
