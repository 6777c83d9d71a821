#!/usr/bin/env bash
# Measure the algorithms on 4, 9 and 16 hosts with slow links, and draw the speed-ups.
# Some 30 minutes; needs root. Results and pictures go into this folder.
#
# usage: sudo benchmarks/network/run.sh [PYTHON]        PYTHON with mpiattn, MPICH and matplotlib; .venv's if not given
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${1:-$here/../../.venv/bin/python}

# measure NAME HOSTS ROUNDS OPTIONS...
measure() {
    local name=$1 hosts=$2 rounds=$3
    shift 3
    echo "== $name"
    "$here/../../run/netns.sh" --hosts "$hosts" --rate 10mbit --mpiexec "$(dirname "$python")/mpiexec" -- \
        "$python" "$here/measure.py" --rate 10mbit --rounds "$rounds" --json "$here/$name.json" "$@" |
        tee "$here/$name.txt"
}
measure 4-mha 4 7 --heads 16 --kv-heads 16 --head-dim 128
measure 4-gqa 4 5 --heads 16 --kv-heads 4 --head-dim 128
measure 9-mha 9 5 --heads 18 --kv-heads 18 --head-dim 128
measure 9-gqa 9 5 --heads 36 --kv-heads 9 --head-dim 64
measure 16-mha 16 3 --heads 16 --kv-heads 16 --head-dim 128
measure 16-gqa 16 3 --heads 16 --kv-heads 4 --head-dim 128
others=(--algorithms "ring,double_ring,mesh_gathered,hybrid,dense")
measure 4-others 4 3 --heads 16 --kv-heads 16 --head-dim 128 "${others[@]}"
measure 9-others 9 3 --heads 18 --kv-heads 18 --head-dim 128 "${others[@]}"
measure 16-others 16 3 --heads 16 --kv-heads 16 --head-dim 128 "${others[@]}"
"$python" "$here/plot.py"
