#!/usr/bin/env bash
# Distils the causal Wan2.1 1.3B of recipes/causal_1.3b.sh to 4 steps a chunk by self-forcing, beside the bidirectional
# teacher; python sample.py --ckpt=out/streaming-1.3b --frames=N then makes clips of any length.
# Prompts as for recipes/distill_1.3b.sh. 8 GPUs: 31 GB of each, 159 GB of disk.
# LAUNCH=python recipes/streaming_1.3b.sh --dry_run 8 80 prints what adds up to that.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600   # s to finish a step and save after SIGTERM; torch 2.11's torchrun has 30
WAN=${WAN:-weights/Wan2.1-T2V-1.3B-Diffusers}
${LAUNCH:-torchrun --standalone --nproc_per_node=8} distill.py --model=wan-1.3b \
    --teacher="$WAN" --student=out/causal-1.3b --window -9 1 1 --tile 3 99 99 --vae="$WAN" --data=data/wan \
    --out=out/streaming-1.3b --shard=-1 --micro_batch=1 "$@"
