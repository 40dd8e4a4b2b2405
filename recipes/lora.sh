#!/usr/bin/env bash
# A LoRA of Wan2.1 1.3B on one GPU of 24 GB: 21 GB of it, 3 GB of disk.
# LAUNCH=python recipes/lora.sh --dry_run 1 24 prints what adds up to that. Afterwards, for diffusers or ComfyUI:
# python export.py --ckpt=out/lora --lora --format=diffusers --out=lora
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-T2V-1.3B-Diffusers}
${LAUNCH:-python} train.py --model=wan-1.3b --init="$WAN" --vae="$WAN" --data=data/wan --out=out/lora \
    --lora_rank=32 --lr=1e-4 --steps=2000 --batch=8 "$@"
