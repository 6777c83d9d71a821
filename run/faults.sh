#!/usr/bin/env bash
# Make the table of docs/faults.md: each fault with each MPI library, what is said, and how soon the job has ended. What
# the jobs print goes to standard error. Needs Python 3.10 and its venv module; installs the rest, each library into an
# environment of its own: .venv, .venv-openmpi, .venv-impi. Links are cut and slowed as root only.
#
# usage: run/faults.sh [--mpi "mpich openmpi impi"] [--seconds 3] [--faults kill,stop,...] [--python python3.12]
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

mpis='mpich openmpi impi' python='' words=(--page docs/faults.md)
while (($#)); do
    case $1 in
        --mpi) mpis=${2:?--mpi needs names} && shift 2 ;;
        --seconds) words+=("$1" "${2:?--seconds needs a number}") && shift 2 ;;
        --faults) words=("$1" "${2:?--faults needs names}") && shift 2 ;; # a part is no page
        --python) python=${2:?--python needs a name} && shift 2 ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) die "unknown option $1; see --help" ;;
    esac
done

python=$(find_python "$python")
declare -A names=([mpich]=MPICH [openmpi]="Open MPI" [impi]="Intel MPI")
libraries=()
for mpi in $mpis; do
    [[ -n ${names[$mpi]-} ]] || die "--mpi takes mpich, openmpi, impi"
    venv=$root/.venv
    [[ $mpi == mpich ]] || venv=$root/.venv-$mpi # never two MPI libraries in one environment
    make_venv "$venv" "$mpi test" "$python" >&2
    libraries+=("${names[$mpi]}=$venv/bin/mpiexec=$venv/bin/python")
done
mpi_settings
cd "$root"
exec "${libraries[0]##*=}" tests/fault_table.py "${words[@]}" "${libraries[@]}"
