#!/usr/bin/env bash
# What a machine with an NVIDIA driver and Python gets from pip alone, as docs/gpus.md says: for Open MPI,
# MPICH and Intel MPI a new environment each, in it the ring and the mesh against the oracle, and their speed.
#
# usage: benchmarks/gpu/pip_only.sh [cuda13|cuda12] [RANKS]     RANKS: 2 if not given
set -euo pipefail
cuda=${1:-cuda13} ranks=${2:-2}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

echo "CUDA compiler: $(command -v nvcc || echo none)"
echo "CUDA libraries of the system: $(ldconfig -p | grep -c libcudart || true)"
for mpi in openmpi mpich intel; do
    python3 -m venv "$folder/$mpi"
    case $mpi in
        openmpi) packages=(".[$cuda]") ;;
        mpich) packages=(".[${cuda/cuda/cupy},mpich]") ;; # never two MPI libraries in one environment
        intel) packages=(".[${cuda/cuda/cupy}]" impi-rt) ;;
    esac
    printf '\n== pip install'
    printf " '%s'" "${packages[@]}"
    echo
    "$folder/$mpi/bin/pip" install -q --no-compile "${packages[@]}"
    PATH=$folder/$mpi/bin:$PATH
    run/gpu.sh -n "$ranks" mpiattn conformance --arrays cupy --algorithms ring,mesh
    run/gpu.sh -n "$ranks" mpiattn bench attention --algorithms ring --tokens 8192,32768 --rounds 5 --no-torch
done
