#!/usr/bin/env bash
# Check every algorithm, in every variant, on the whole conformance matrix at several numbers of ranks, and print a
# table: under mpiexec, or on virtual ranks in one process. What is wrong goes to stderr, each with the command that
# runs it alone. Needs Python 3.10 and its venv module; installs the rest.
#
# usage: run/matrix.sh [--mpi mpich|openmpi|virtual] [--ranks "1 2 4"] [--part] [--jobs N] [--python python3.12]
#                      [-- ARGUMENTS]
#
#   --mpi      which MPI library (mpich), or virtual: none
#   --ranks    numbers of ranks (1 to 9)
#   --part     of the matrix the part that has one of everything: a ninth of the cases
#   --jobs     how many runs side by side, each with its share of the cases (1)
#   ARGUMENTS  of mpiattn conformance, for example:  run/matrix.sh --ranks 4 -- --algorithms ring,mesh
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

mpi=mpich ranks='1 2 3 4 5 6 7 8 9' part=whole jobs=1 python=''
while (($#)); do
    case $1 in
        --mpi)
            [[ ${2-} =~ ^(mpich|openmpi|virtual)$ ]] || die "--mpi takes mpich, openmpi or virtual"
            mpi=$2 && shift 2
            ;;
        --ranks)
            [[ ${2-} =~ ^[1-9][0-9]*( +[1-9][0-9]*)*$ ]] || die "--ranks takes numbers, as in --ranks \"1 2 4\""
            ranks=$2 && shift 2
            ;;
        --part) part=part && shift ;;
        --jobs)
            [[ ${2-} =~ ^[1-9][0-9]*$ ]] || die "--jobs takes a number"
            jobs=$2 && shift 2
            ;;
        --python) python=${2:?--python needs a name} && shift 2 ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        --) shift && break ;;
        *) die "unknown option $1; see --help" ;;
    esac
done

python=$(find_python "$python")
venv=$root/.venv
[[ $mpi != openmpi ]] || venv=$root/.venv-openmpi # never two MPI libraries in one environment
make_venv "$venv" "${mpi#virtual} test" "$python" >&2
mpi_settings
cd "$root"

arguments=(conformance "$@")
[[ $part == part ]] || arguments+=(--full)
said=$(mktemp -d)
# Bash lets what runs in the background not see Ctrl-C.
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$said"' EXIT
row='%-8s %5s  %-6s %7s %7s %8s %8s\n' status=0
# shellcheck disable=SC2059
printf "$row" MPI ranks matrix passed failed refused seconds
for n in $ranks; do
    start=$SECONDS passed=0 failed=0 refused=0 ended=0
    for ((job = 1; job <= jobs; job++)); do
        if [[ $mpi == virtual ]]; then
            run=("$venv/bin/python" -m mpiattn "${arguments[@]}" --virtual "$n")
        else
            # -m mpi4py: an exception on one rank ends the job, instead of leaving the others waiting.
            run=("$venv/bin/mpiexec" -n "$n" "$venv/bin/python" -m mpi4py -m mpiattn "${arguments[@]}")
        fi
        "${run[@]}" --share "$job/$jobs" >"$said/$job" &
    done
    for process in $(jobs -p); do wait "$process" || status=1; done
    for ((job = 1; job <= jobs; job++)); do
        if [[ $(<"$said/$job") =~ ([0-9]+)\ passed,\ ([0-9]+)\ failed(,\ ([0-9]+)\ refused)? ]]; then
            ((passed += BASH_REMATCH[1], failed += BASH_REMATCH[2], refused += ${BASH_REMATCH[4]:-0}, ++ended))
        fi
    done
    if ((ended == jobs)); then
        # shellcheck disable=SC2059
        printf "$row" "$mpi" "$n" "$part" "$passed" "$failed" "$refused" "$((SECONDS - start))"
    else
        printf '%-8s %5s  %d of %d runs did not end\n' "$mpi" "$n" "$((jobs - ended))" "$jobs"
    fi
done
exit $status
