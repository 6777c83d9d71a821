#!/usr/bin/env bash
# Describe the hosts that benchmarks/network/run.sh measured on, and put predicted times beside measured ones.
# A few minutes; needs root. Run it when the machine is quiet.
#
# On GPUs, instead: run/gpu.sh -n 2 mpiattn calibrate --arrays cupy --output h200-2.toml; the bench attention of
# benchmarks/gpu/all-2.txt; then, once with MACHINE=h200-2.toml and once with the preset, MACHINE=h200-nvlink:
#   predict.py $MACHINE=../gpu/all-2.json $MACHINE=../gpu/attention-4.json --name predicted-gpu (or predicted-preset)
#       --title "algorithms on two H200s, ring and mesh on four"
#
# usage: sudo benchmarks/calibration/run.sh [PYTHON]        PYTHON with mpiattn, MPICH and matplotlib
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:-$here/../../.venv/bin/python}
pairs=()
for hosts in 4 9 16; do
    heads=16
    if ((hosts == 9)); then heads=18; fi
    "$here/../../run/netns.sh" --hosts "$hosts" --rate 10mbit --mpiexec "$(dirname "$python")/mpiexec" -- \
        "$python" -m mpiattn calibrate --output "$here/netns-$hosts.toml" --bytes 131072 --rounds 5 \
        --tokens 32,128 --heads "$heads" --head-dim 128
    for kind in mha gqa others; do
        pairs+=("$here/netns-$hosts.toml=$here/../network/$hosts-$kind.json")
    done
done
"$python" "$here/predict.py" "${pairs[@]}"
