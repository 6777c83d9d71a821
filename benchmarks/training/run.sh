#!/usr/bin/env bash
# Train the model of small.toml on the licence texts that Debian comes with, on 4 ranks: 2 sequences at a time, each
# on 2 ranks. Then let it go on with a text.
#
# usage: benchmarks/training/run.sh FOLDER
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}") folder=${1:?name a folder}
find /usr/share/common-licenses -type f | LC_ALL=C sort | xargs cat >"$folder.txt"
wc -c <"$folder.txt"
mpiexec -n 4 python -m mpiattn train --text "$folder.txt" --config "$here/small.toml" --data 2 \
    --output "$folder" --plot "$here/curve.png"
