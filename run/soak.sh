#!/usr/bin/env bash
# Check random algorithms, shapes and grids back to back in one job, for some minutes: every result and its traffic.
# Memory, open files and communicators of the ranks must not grow. Needs Python 3.10 and its venv module; installs the
# rest, MPI included, into .venv or .venv-openmpi.
#
# usage: run/soak.sh [--minutes 20 | --builds 10000] [--mpi mpich|openmpi] [--ranks 4] [--seed 0] [--algorithms all]
#                    [--python python3.12]
#
#   --minutes     how long
#   --builds      instead: build so many attentions inside `with`, and as many without, which nobody frees
#   --algorithms  names between commas; a variant of one is, for example, 'mesh rows=2 cols=2'
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

mpi=mpich ranks=4 python='' words=(--minutes 20)
while (($#)); do
    case $1 in
        --minutes | --builds | --seed | --algorithms) words+=("$1" "${2:?$1 needs a value}") && shift 2 ;;
        --mpi)
            [[ ${2-} =~ ^(mpich|openmpi)$ ]] || die "--mpi takes mpich or openmpi"
            mpi=$2 && shift 2
            ;;
        --ranks)
            [[ ${2-} =~ ^[1-9][0-9]*$ ]] || die "--ranks takes a number"
            ranks=$2 && shift 2
            ;;
        --python) python=${2:?--python needs a name} && shift 2 ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) die "unknown option $1; see --help" ;;
    esac
done

python=$(find_python "$python")
venv=$root/.venv
[[ $mpi == mpich ]] || venv=$root/.venv-$mpi # never two MPI libraries in one environment
make_venv "$venv" "$mpi plot test dev" "$python" >&2
mpi_settings
cd "$root"
# -m mpi4py: an exception on one rank ends the job, instead of leaving the others waiting.
exec "$venv/bin/mpiexec" -n "$ranks" "$venv/bin/python" -m mpi4py tests/soak.py "${words[@]}"
