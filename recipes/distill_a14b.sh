#!/usr/bin/env bash
# Distils Wan2.2 A14B to 4 steps on 8 GPUs, one expert after the other: first as it stands, then with EXPERT=low, whose
# rollouts the high student begins. Adapters of one frozen expert, 4 GPUs share each clip: 24 GB of each, 34 GB of disk.
# LAUNCH=python recipes/distill_a14b.sh --dry_run 8 80 prints what adds up to that; EXPERT=low takes 28 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.2-T2V-A14B-Diffusers}
EXPERT=${EXPERT:-high}
if [ "$EXPERT" = low ]; then set -- --other=out/few-high "$@"; fi
${LAUNCH:-torchrun --standalone --nproc_per_node=8} distill.py --model=wan2.2-a14b --expert="$EXPERT" \
    --teacher="$WAN" --vae="$WAN" --data=data/wan --out="out/few-$EXPERT" --lora_rank=64 --student_lr=1e-4 \
    --critic_lr=2e-5 --shard=-1 --sp=4 "$@"
