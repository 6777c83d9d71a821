# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment with mpiattn, an MPI library and tools, all from pip.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# find_python [NAME]: print the Python to use, NAME or the first that is new enough.
find_python() {
    local name
    for name in ${1:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    name=${1:-python3}
    command -v "$name" >/dev/null || die "there is no $name here; needs Python 3.10 or newer"
    die "needs Python 3.10 or newer; $name is $("$name" --version 2>&1).
Install one and name it, as in: $(basename "$0") --python python3.12"
}

# make_venv FOLDER "EXTRA EXTRA ..." PYTHON: make or complete the environment; takes no time when it is complete.
make_venv() {
    local folder=$1 extras=$2 python=$3 stamp=$1/mpiattn-installed have='' version extra missing=''
    version="$("$python" --version) $root" # an environment can't be moved
    # The stamp: the line above, the extras, and the pyproject.toml that they came from.
    if [[ -f $stamp && $(sed -n 1p "$stamp") == "$version" ]] && "$folder/bin/python" -c '' &&
        diff -q <(tail -n +3 "$stamp") "$root/pyproject.toml" >/dev/null; then
        have=$(sed -n 2p "$stamp")
    fi
    for extra in $extras; do
        [[ " $have " == *" $extra "* ]] || missing+=" $extra"
    done
    [[ -n $missing ]] || return 0

    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no venv module; on Debian or Ubuntu: apt install python3-venv"
    extras="${have:+$have }${missing# }"
    echo "Installing mpiattn with$missing into $folder ..."
    if [[ -f $stamp && $(sed -n 1p "$stamp") == "$version" ]]; then
        rm "$stamp" # not complete until the end
    else
        "$python" -m venv --clear "$folder"
    fi
    # Editable: a change of the source needs no new installation.
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "${root}[${extras// /,}]" ||
        die "pip could not install; see its message above"
    { printf '%s\n' "$version" "$extras" && cat "$root/pyproject.toml"; } >"$stamp"
}

# What the ranks need, with either MPI, on a machine with fewer cores than ranks.
mpi_settings() {
    # One BLAS thread a rank: two for each of 9 ranks on 2 cores made everything tens of times slower.
    export OMP_NUM_THREADS=1
    # With more ranks than cores a rank must yield its core while it waits. MPICH does (none of its settings
    # made 9 ranks on 2 cores faster); Open MPI does when told (a third faster), and only starts when told.
    export OMPI_MCA_mpi_yield_when_idle=1
    export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_rmaps_base_oversubscribe=1
    # Bound to cores, two jobs side by side would share the first ones.
    export PRTE_MCA_hwloc_default_binding_policy=none
    if ((EUID == 0)); then # as in a container; Open MPI refuses otherwise
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    # Without cached bytecode each rank compiles all that it imports: a second of CPU time, and more.
    unset PYTHONDONTWRITEBYTECODE
}
