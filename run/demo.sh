#!/usr/bin/env bash
# Compare the algorithms on four ranks of this machine: a table and a picture. Needs Python 3.10 and its venv
# module; the rest, MPI included, is installed into .venv.
#
# usage: run/demo.sh [--python python3.12]
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

python=''
while (($#)); do
    case $1 in
        --python) python=${2:?--python needs a name} && shift 2 ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) die "unknown option $1; see --help" ;;
    esac
done

python=$(find_python "$python")
make_venv "$root/.venv" "mpich plot" "$python"
mpi_settings
cd "$root"
.venv/bin/mpiexec -n 4 .venv/bin/mpiattn compare --plot demo.png --json demo.json
echo "The picture is $root/demo.png, the numbers are in $root/demo.json"
