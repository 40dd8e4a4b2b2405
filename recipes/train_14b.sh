#!/usr/bin/env bash
# Finetunes Wan2.1 14B on 8 GPUs: FSDP2 over all, and 4 share each clip. 58 GB of each GPU, 457 GB of disk, and 229 GB
# of the machine's memory while it saves. LAUNCH=python recipes/train_14b.sh --dry_run 8 80 prints what adds up to that.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-T2V-14B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} train.py --model=wan-14b \
    --init="$WAN" --vae="$WAN" --data=data/wan --out=out/wan-14b --shard=-1 --sp=4 --keep=1 "$@"
