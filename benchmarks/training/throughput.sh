#!/usr/bin/env bash
# Training throughput over a slow network: 4 hosts with 10 Mbit/s each way, ring, mesh and Ulysses by turns, beside
# what benchmarks/calibration/netns-4.toml, measured on such hosts, predicts. 3 minutes; needs root.
#
# usage: sudo benchmarks/training/throughput.sh [PYTHON]        PYTHON with mpiattn and MPICH; .venv's if not given
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(realpath -s "${1:-$here/../../.venv/bin/python}")
cd "$here"
../../run/netns.sh --hosts 4 --rate 10mbit --mpiexec "$(dirname "$python")/mpiexec" -- \
    "$python" -m mpiattn bench train --steps 7 --machine ../calibration/netns-4.toml --json throughput.json |
    tee throughput.txt
