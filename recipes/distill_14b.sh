#!/usr/bin/env bash
# Distils Wan2.1 14B to 4 steps without guidance (DMD2) on 8 GPUs. Student and critic are adapters of the one teacher,
# which is sharded, and 4 GPUs share each clip: 24 GB of each, 34 GB of disk.
# LAUNCH=python recipes/distill_14b.sh --dry_run 8 80 prints what adds up to that.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-T2V-14B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} distill.py --model=wan-14b \
    --teacher="$WAN" --vae="$WAN" --data=data/wan --out=out/few-14b --lora_rank=64 --student_lr=1e-4 --critic_lr=2e-5 \
    --shard=-1 --sp=4 "$@"
