#!/usr/bin/env bash
# Start ranks on GPUs, with an MPI library that sends device memory itself if it can: one rank for each GPU.
#
# usage: run/gpu.sh [-n RANKS] [--mpi openmpi|mpich|cray|intel] [--print] COMMAND...
#
#   -n       how many ranks; as many as there are GPUs here if not given
#   --mpi    which MPI library's launcher; found out if not given
#   --print  show the command line and don't run it
#
# for example:  run/gpu.sh -n 4 mpiattn bench attention
#               run/gpu.sh -n 4 python -m mpi4py -m pytest -m gpu
#
# Whatever the library, mpiattn finds out at start whether device memory can be sent, and else sends it through
# the host's memory: --gpu-messages device or host decides it.
set -euo pipefail

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

ranks='' mpi='' show=''
while (($#)); do
    case $1 in
        -n) ranks=${2:?-n needs a number} && shift 2 ;;
        --mpi) mpi=${2:?--mpi needs a name} && shift 2 ;;
        --print) show=1 && shift ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) break ;;
    esac
done
(($#)) || die "which command? see --help"
[[ -n $ranks ]] || ranks=$(nvidia-smi --list-gpus | wc -l)

# The environment in which the command is installed: its own bin folder comes first.
if command=$(command -v "$1"); then
    bin=$(dirname "$command")
    PATH=$bin:$PATH
fi
if [[ -z $mpi ]]; then
    case $(mpiexec --version 2>&1 || true) in
        *"Open MPI"* | *OpenRTE* | *prte* | *PRRTE*) mpi=openmpi ;;
        *Intel*) mpi=intel ;;
        *HYDRA* | *MPICH*) mpi=mpich ;;
        *) if [[ -n ${CRAY_MPICH_VERSION-} ]]; then mpi=cray; else die "which MPI? say --mpi"; fi ;;
    esac
fi

settings=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
case $mpi in
    openmpi)
        # Open MPI sends device memory through UCX. The UCX in the openmpi package knows nothing of GPUs, the one in
        # libucx-cu13 (or -cu12) does: it has to be found first.
        python=$(command -v python || command -v python3)
        ucx=$("$python" -c 'import libucx, os; print(os.path.join(os.path.dirname(libucx.__file__), "lib"))' 2>/dev/null) ||
            ucx=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/libucx/lib")')
        [[ ! -d $ucx ]] || settings+=("LD_LIBRARY_PATH=$ucx${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")
        # The sender writes straight into the receiver's memory: a few per cent faster over NVLink.
        settings+=("UCX_RNDV_SCHEME=${UCX_RNDV_SCHEME:-put_zcopy}")
        if ((EUID == 0)); then # as in a container; Open MPI refuses otherwise
            settings+=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
        fi
        # Open MPI steps aside for others where it sees no InfiniBand; the last two settings keep UCX in use.
        launch=(mpiexec -n "$ranks" --bind-to none --mca pml ucx
            --mca opal_common_ucx_tls any --mca opal_common_ucx_devices any)
        for setting in "${settings[@]}"; do launch+=(-x "${setting%%=*}"); done # other launchers pass on all
        ;;
    mpich)
        # MPICH from pip sends no device memory: messages go through the host. One built with --with-cuda does,
        # with this set.
        settings+=(MPIR_CVAR_ENABLE_GPU=1)
        launch=(mpiexec -n "$ranks")
        ;;
    cray)
        # With the module craype-accel-nvidia90 (or 80) loaded, and mpi4py built on this MPI.
        settings+=(MPICH_GPU_SUPPORT_ENABLED=1)
        launch=(srun --ntasks "$ranks" --gpus-per-task 1 --gpu-bind none)
        ;;
    intel)
        # From Intel MPI 2021.13 on, also the one from pip (impi-rt); I_MPI_OFFLOAD=2 insists on it. It leaves each rank
        # one GPU to see.
        settings+=(I_MPI_OFFLOAD=1 I_MPI_OFFLOAD_MODE=cuda)
        launch=(mpiexec -n "$ranks")
        ;;
    *) die "--mpi takes openmpi, mpich, cray or intel, not $mpi" ;;
esac

command=(env "${settings[@]}" "${launch[@]}" "$@")
if [[ -n $show ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
