#!/usr/bin/env bash
# Check random cases of all algorithms against the oracle and the formulas for some minutes. What fails is made as
# simple as possible and printed as one command that runs it alone. Needs Python 3.10 and its venv module; installs
# the rest, MPI included, into .venv.
#
# usage: run/fuzz.sh [--minutes 5] [--ranks 4] [--seed 0] [--algorithms all] [--python python3.12]
#
#   --minutes     how long
#   --ranks       how many
#   --seed        the same seed gives the same cases, as far as the time allows
#   --algorithms  names between commas; a variant of one is, for example, 'mesh rows=2 cols=2'
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

minutes=5 ranks=4 seed=0 algorithms=all python=''
while (($#)); do
    case $1 in
        --minutes) minutes=${2:?--minutes needs a number} && shift 2 ;;
        --ranks) ranks=${2:?--ranks needs a number} && shift 2 ;;
        --seed) seed=${2:?--seed needs a number} && shift 2 ;;
        --algorithms) algorithms=${2:?--algorithms needs names} && shift 2 ;;
        --python) python=${2:?--python needs a name} && shift 2 ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) die "unknown option $1; see --help" ;;
    esac
done
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ && $ranks =~ ^[1-9][0-9]*$ && $seed =~ ^[0-9]+$ ]] ||
    die "--minutes, --ranks and --seed take numbers; see --help"

python=$(find_python "$python")
make_venv "$root/.venv" "mpich plot test dev" "$python"
mpi_settings
cd "$root"
# -m mpi4py: an exception on one rank ends the job, instead of leaving the others waiting.
exec .venv/bin/mpiexec -n "$ranks" .venv/bin/python -m mpi4py tests/fuzz.py \
    --minutes "$minutes" --seed "$seed" --algorithms "$algorithms"
