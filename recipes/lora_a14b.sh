#!/usr/bin/env bash
# A LoRA of one of Wan2.2 A14B's two experts on one GPU of 141 GB: 97 GB of it, 10 GB of disk. EXPERT=low is the other,
# a run of its own. LAUNCH=python recipes/lora_a14b.sh --dry_run 1 141 prints what adds up to that. Afterwards both are
# written: python export.py --ckpt=out/lora-high --other=out/lora-low --lora --out=lora
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.2-T2V-A14B-Diffusers}
EXPERT=${EXPERT:-high}
${LAUNCH:-python} train.py --model=wan2.2-a14b --expert="$EXPERT" --init="$WAN" --vae="$WAN" --data=data/wan \
    --out="out/lora-$EXPERT" --lora_rank=32 --lr=1e-4 --steps=2000 --batch=8 "$@"
