#!/usr/bin/env bash
# Train the model of examples/video.py on 4 ranks, with attention over the 1,024 frames of a clip and without.
#
# usage: benchmarks/training/video.sh >video.txt
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
for options in '' --no-attention; do
    echo "\$ mpiexec -n 4 python examples/video.py${options:+ $options}"
    TIMEFORMAT='%0R s, %0U s of the cores'
    time mpiexec -n 4 python "$here/../../examples/video.py" $options
    echo
done 2>&1
