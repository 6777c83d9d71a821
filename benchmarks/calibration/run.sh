#!/usr/bin/env bash
# Describe the hosts that benchmarks/network/run.sh measured on, and put predicted times beside measured ones.
# A few minutes; needs root. Run it when the machine is quiet.
#
# On GPUs, instead: run/gpu.sh -n 2 mpiattn calibrate --arrays cupy --output h200-2.toml, and what the heads of
# benchmarks/gpu/*.txt say. Then, on any machine, once with h200-2.toml and NAME=predicted-gpu, once with the preset,
# MACHINE=h200-nvlink and NAME=predicted-preset:
#   cd benchmarks/calibration
#   python predict.py --name $NAME --title "algorithms on two and four H200s" \
#       $MACHINE=../gpu/{all-2,attention-2,all-4,attention-4,attention_slower_host-4,gqa-4}.json
# and with FlashAttention-4, calibrated and measured on one machine, NAME=predicted-flash4:
#   python predict.py --name $NAME --title "algorithms on two H200s, FlashAttention-4" \
#       h200-2-flash4.toml=../gpu/{all,attention,gqa}_flash4-2.json
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
