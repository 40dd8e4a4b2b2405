#!/usr/bin/env bash
# Any recipe on several machines of 8 GPUs: the same line on each, HEAD one of them, out/ on a disk that all share:
#     HEAD=node0 NODES=4 recipes/nodes.sh recipes/train_14b.sh --shard=8
# With --shard=8 each machine has one copy of the model: 58 GB of each GPU, as on one machine, and 457 GB of disk.
# LAUNCH=python recipes/nodes.sh recipes/train_14b.sh --shard=8 --dry_run 32 80 prints what adds up to that.
# If ranks of several machines do not find each other, gloo took the wrong network interface (docker0, say): name the
# right one, as `ip addr` lists it, on each: export GLOO_SOCKET_IFNAME=eth0
set -euo pipefail
cd "$(dirname "$0")/.."
export LAUNCH=${LAUNCH:-torchrun --nnodes=${NODES:?how many machines} --nproc_per_node=8 --rdzv_backend=c10d
    --rdzv_endpoint=${HEAD:?the name of one of them}:29500 --rdzv_id=nanovideo}
"$@"
