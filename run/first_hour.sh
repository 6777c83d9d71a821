#!/usr/bin/env bash
# Play the first hour of four users in a fresh clone, with the lines of README.md and docs/, word for word:
#
#   student     installs with an MPI library from pip, runs the first command and the examples
#   teacher     runs the program of the README
#   developer   runs tests with and without pytest-mpi, and a ring of her own under conformance
#   cluster     has an MPI library already: Debian's Open MPI, then Debian's MPICH
#
# usage: run/first_hour.sh [--python python3.12] [USER ...]
#
# The lines are those of the blocks that are marked in these files (see run/readme.py). Debian's libraries are
# installed where they are missing and the user is root; elsewhere that user is left out, and with CI=true fails.
set -euo pipefail
# shellcheck source=run/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

python=''
while (($#)); do
    case $1 in
        --python) python=${2:?--python needs a name} && shift 2 ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        student | teacher | developer | cluster) users+=("$1") && shift ;;
        *) die "unknown argument $1; see --help" ;;
    esac
done
python=$(find_python "$python")
mpi_settings
unset PYTHONPATH
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
[[ -v users ]] || users=(student teacher developer cluster)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone --quiet "$root" "$work/mpiattn"
cd "$work/mpiattn"

# on_path FOLDER COMMAND...: run a command as a user whose environment is in this folder.
on_path() {
    local folder=$1
    shift
    if [[ ! -d $folder ]]; then "$python" -m venv "$folder"; fi
    PATH=$folder/bin:$PATH "$@" </dev/null
}

# play BLOCK [PATTERN [MORE]]: run the lines of a block, or those with a pattern in them, with MORE at the end of the
# last one; what they print is also in $work/log.
play() {
    local lines
    lines=$("$python" run/readme.py --print "$1" | grep --extended-regexp "${2-}")${3:+ $3}
    printf '\n+ %s\n' "${lines//$'\n'/$'\n'+ }"
    on_path "$venv" bash -euo pipefail -c "$lines" 2>&1 | tee "$work/log"
}

# expect TEXT: end the script unless the last block has printed this.
expect() {
    grep --quiet --extended-regexp "$1" "$work/log" || die "expected to read: $1"
}

student() {
    venv=$work/pip
    play start
    expect 'mesh.* ok'
    play examples
    expect 'rank 3 .*sent'
}

teacher() {
    venv=$work/pip
    [[ -x $venv/bin/mpiattn ]] || on_path "$venv" pip install '.[mpich]'
    "$python" run/readme.py --print program.py >"$work/program.py"
    mv "$work/program.py" .
    play program
}

developer() {
    local some='tests/test_examples.py tests/test_layout.py'
    venv=$work/pip
    play tests '' "$some"
    expect '[1-9][0-9]* passed'
    on_path "$venv" pip uninstall --yes pytest-mpi
    play tests mpiexec "$some"
    expect '[1-9][0-9]* passed'
    play conformance
    expect '[1-9][0-9]* passed, 0 failed'
}

cluster() {
    local mpi HOME=$work # of this user
    venv=$work/cluster
    if ! command -v mpiexec.openmpi >/dev/null || ! command -v mpiexec.mpich >/dev/null; then
        if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
            [[ ${CI-} != true ]] || die "needs root on Debian, for openmpi-bin and mpich"
            echo "left out: needs mpiexec.openmpi and mpiexec.mpich, as Debian's packages openmpi-bin and mpich have them"
            return
        fi
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends openmpi-bin mpich >/dev/null
    fi
    for mpi in openmpi mpich; do
        mkdir -p "$work/$mpi"
        printf '#!/bin/sh\nexec mpiexec.%s "$@"\n' "$mpi" >"$work/$mpi/mpiexec" # as if it were the only one
        chmod +x "$work/$mpi/mpiexec"
        if [[ $mpi == mpich ]]; then
            eval "$("$python" run/readme.py --print debian-mpich)"
        fi
        PATH=$work/$mpi:$PATH play cluster
        expect "$([[ $mpi == openmpi ]] && echo 'Open MPI v?4' || echo 'MPICH.* 4')"
        expect 'mesh.* ok'
    done
}

for user in "${users[@]}"; do
    printf '\n===== %s\n' "$user"
    start=$SECONDS
    "$user"
    printf '===== %s: %d s\n' "$user" $((SECONDS - start))
done
