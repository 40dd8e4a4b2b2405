#!/usr/bin/env bash
# Any recipe on SLURM, from the repository's folder. A job saves 15 minutes before its end, or when it is preempted;
# the same line goes on from there:
#     sbatch recipes/slurm.sh recipes/train_14b.sh --shard=8
# On 4 nodes of 8 GPUs: 58 GB of each GPU and 457 GB of disk, as recipes/nodes.sh has it.
# GLOO_SOCKET_IFNAME=eth0 before sbatch, which passes it on, names the network interface where gloo picks a wrong one.
#SBATCH --job-name=nanovideo --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --time=24:00:00 --signal=TERM@900 --requeue --open-mode=append --output=slurm-%j.log
set -euo pipefail
if [ -z "${LAUNCH:-}" ]; then
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export LAUNCH="srun torchrun --nnodes=$SLURM_NNODES --nproc_per_node=8 --rdzv_backend=c10d
        --rdzv_endpoint=$head:29500 --rdzv_id=$SLURM_JOB_ID"
fi
"$@"
