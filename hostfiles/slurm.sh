#!/bin/bash
#SBATCH --job-name=mpiattn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=00:10:00
#
# Two nodes with four ranks of eight cores each:   sbatch hostfiles/slurm.sh
#
# Slurm knows the hosts, so that there is no host file. Install mpiattn with the cluster's own MPI library
# (module load ..., then pip install . in an environment on a file system that the nodes share).
#
# --mpi must fit the MPI library: pmix for Open MPI, pmi2 for MPICH and what derives from it (Intel MPI,
# Cray MPICH, MVAPICH). `srun --mpi=list` shows what this Slurm has. If every rank says that it is rank 0 of
# 1, it doesn't fit.
set -euo pipefail

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun --mpi=pmix --cpus-per-task="$SLURM_CPUS_PER_TASK" mpiattn env
srun --mpi=pmix --cpus-per-task="$SLURM_CPUS_PER_TASK" mpiattn compare --json compare.json
