#!/usr/bin/env bash
# An example for SLURM: one run on several nodes, gone on with after a time limit or a preemption.
#
#   sbatch scripts/slurm_train.sh RECIPE [key=value ...]
#
# The output folder has to be on a file system that all nodes share. Written from SLURM's and torchrun's documentation;
# it has not been run on a cluster yet.
#SBATCH --job-name=stepdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# What is not saved when the job ends is done again: keep train.checkpoint_every small enough for that.
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    -m stepdistill train "$@"
