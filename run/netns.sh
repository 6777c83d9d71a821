#!/usr/bin/env bash
# Run an MPI program on several hosts with a slow network, all of them on this machine: each host is a network
# namespace with an address and a host name of its own, behind a link of the rate that you give. Linux, as root.
#
# usage: run/netns.sh [OPTIONS] [--] COMMAND...
#
#   --hosts N        number of hosts; 4 if not given
#   --ranks N        ranks on each host; 1 if not given
#   --rate RATE      of each host's link, each way, as tc writes it: 100mbit, 1gbit; not limited if not given
#   --latency TIME   one way from host to host: 500us, 2ms; needs the kernel's netem
#   --mpiexec FILE   of MPICH, Open MPI or Intel MPI; if not given that of .venv, else of PATH
#   --host NAME      run COMMAND itself, without mpiexec, on that host (node1 ... nodeN, or head)
#   --check          say whether this can run here: exit code 0, or 3 and the reason
#
# for example:  sudo run/netns.sh --hosts 4 --rate 100mbit .venv/bin/mpiattn compare
#
# The hosts see each other and nothing else: not this machine, not its network. All of it, processes too, is
# removed at the end, after a failure or Ctrl-C as well.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
die() {
    printf 'netns.sh: %s\n' "$2" >&2
    exit "$1"
}

hosts=4 ranks=1 rate='' latency='' mpiexec='' only='' check=''
while (($#)); do
    case $1 in
        --hosts | --ranks)
            [[ ${2-} =~ ^[1-9][0-9]{0,2}$ ]] || die 2 "$1 takes a number from 1"
            [[ $1 == --hosts ]] && hosts=$2 || ranks=$2
            shift 2
            ;;
        --rate)
            [[ ${2-} =~ ^[0-9.]+[kmg]bit$ ]] || die 2 "--rate takes a rate such as 100mbit"
            rate=$2 && shift 2
            ;;
        --latency)
            [[ ${2-} =~ ^[0-9.]+(us|ms)$ ]] || die 2 "--latency takes a time such as 500us or 2ms"
            latency=$2 && shift 2
            ;;
        --mpiexec) mpiexec=${2:?--mpiexec needs a file} && shift 2 ;;
        --host) only=${2:?--host needs a name} && shift 2 ;;
        --check) check=1 && shift ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        --) shift && break ;;
        -*) die 2 "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
((hosts <= 200)) || die 2 "--hosts takes at most 200"
(($#)) || [[ -n $check ]] || die 2 "no command; see --help"
((EUID == 0)) || die 3 "needs root, to make network namespaces: use sudo"
for tool in ip tc unshare; do
    command -v "$tool" >/dev/null || die 3 "needs $tool; on Debian or Ubuntu: apt install iproute2 util-linux"
done

name=mpiattn-$$ # of this run's namespaces: mpiattn-PID-head, mpiattn-PID-node1, ...
folder=$(mktemp -d)

# remove PREFIX: end the processes in the namespaces of that prefix, and delete them.
remove() {
    local space pids
    for space in $(ip netns list | awk -v prefix="$1-" 'index($1, prefix) == 1 { print $1 }'); do
        mapfile -t pids < <(ip netns pids "$space")
        ((${#pids[@]} == 0)) || kill -KILL "${pids[@]}" 2>/dev/null || true
        ip netns delete "$space"
    done
}
job=''
# shellcheck disable=SC2329 # called by the trap
finish() {
    local status=$?
    trap - EXIT
    trap '' INT TERM HUP
    if [[ -n $job ]] && kill -TERM "$job" 2>/dev/null; then
        for _ in {1..20}; do # mpiexec ends its ranks; what it leaves is killed below
            kill -0 "$job" 2>/dev/null || break
            sleep 0.1
        done
    fi
    remove "$name"
    rm -rf "$folder"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# What a run left that was killed with -9.
for other in $(ip netns list | grep -oE '^mpiattn-[0-9]+-head' | grep -oE '[0-9]+' || true); do
    kill -0 "$other" 2>/dev/null || remove "mpiattn-$other"
done

# What a connection may have on its way: 50 ms of the link, 64 KiB at least. More would only queue, and the
# acknowledgements of the other direction with it.
window=$(awk -v rate="${rate:-80gbit}" 'BEGIN {
    unit["k"] = 1e3; unit["m"] = 1e6; unit["g"] = 1e9
    bytes = rate * unit[substr(rate, length(rate) - 3, 1)] / 8 * 0.05
    printf("%d", (bytes < 65536) ? 65536 : (bytes < 4194304) ? bytes : 4194304) }')

# add_host NAME: a namespace with its own loopback.
add_host() {
    ip netns add "$name-$1" 2>"$folder/error" || die 3 "can't make a network namespace: $(<"$folder/error")"
    ip -n "$name-$1" link set lo up
    # The same on every machine; a link that was idle keeps its speed.
    ip netns exec "$name-$1" sysctl -qw net.ipv4.tcp_congestion_control=cubic \
        net.ipv4.tcp_slow_start_after_idle=0 net.ipv4.tcp_early_retrans=0 \
        net.ipv4.tcp_wmem="4096 65536 $window" 2>/dev/null || true
}

# shape NAMESPACE DEVICE DELAY: limit what the device sends.
shape() {
    local parent=(root)
    # Packets no longer than a quarter of a bucket: short messages see the rate, too.
    ip -n "$1" link set "$2" gso_max_size 16384
    if [[ -n $3 ]]; then
        tc -n "$1" qdisc add dev "$2" root handle 1: netem delay "$3" limit 100000 2>"$folder/error" ||
            die 3 "--latency: this kernel has no netem: $(<"$folder/error")"
        parent=(parent 1:1)
    fi
    # A queue long enough to drop nothing: senders are slowed by it, as on a network with flow control.
    [[ -z $rate ]] || tc -n "$1" qdisc add dev "$2" "${parent[@]}" handle 2: tbf rate "$rate" burst 64kb limit 256mb
}

# The switch, and mpiexec at one of its ports without limit.
add_host head
ip -n "$name-head" link add net0 type bridge
ip -n "$name-head" address add 10.77.0.254/24 dev net0
ip -n "$name-head" link set net0 up
for ((i = 1; i <= hosts; i++)); do
    add_host "node$i"
    ip -n "$name-head" link add "node$i" type veth peer name net0 netns "$name-node$i"
    ip -n "$name-head" link set "node$i" master net0 up
    ip -n "$name-node$i" address add "10.77.0.$i/24" dev net0
    ip -n "$name-node$i" link set net0 up
    # Nothing is lost here, only late, behind all that a slow link has to send before: never send twice.
    ip -n "$name-node$i" route change 10.77.0.0/24 dev net0 src "10.77.0.$i" rto_min 30s
    if [[ -n $rate$latency ]]; then
        shape "$name-node$i" net0 "$latency"
        shape "$name-head" "node$i" ''
    fi
    echo "10.77.0.$i:$ranks" >>"$folder/mpich"
    echo "10.77.0.$i slots=$ranks" >>"$folder/openmpi"
done
[[ -z $check ]] || exit 0

# on_host NAME COMMAND...: becomes that command.
on_host() {
    # shellcheck disable=SC2016 # expanded by the inner shell
    exec ip netns exec "$name-$1" unshare --uts bash -c 'hostname "$0"; exec "$@"' "$@"
}

# In the place of ssh: the same arguments, [OPTIONS] HOST COMMAND..., the same joining of the command's words.
cat >"$folder/ssh" <<END
#!/usr/bin/env bash
while [[ \$1 == -* ]]; do shift; done
host=node\${1##*.} && shift
exec ip netns exec "$name-\$host" unshare --uts bash -c "hostname \$host; \$*"
END
chmod +x "$folder/ssh"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
if [[ -n $only ]]; then
    on_host "$only" "$@" <&0 &
else
    if [[ -z $mpiexec ]]; then
        mpiexec=$root/.venv/bin/mpiexec
        [[ -x $mpiexec ]] || mpiexec=$(command -v mpiexec) || die 3 "no mpiexec in .venv nor on PATH; give --mpiexec"
    fi
    library=$("$mpiexec" --version 2>&1 || true)
    if [[ $library =~ 'Open MPI'|OpenRTE|PRRTE ]]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        launch=(--hostfile "$folder/openmpi" -n $((hosts * ranks)) --prtemca plm_ssh_agent "$folder/ssh"
            --prtemca prte_if_include net0 --prtemca prte_tmpdir_base "$folder" --bind-to none
            --mca pml ob1 --mca btl 'tcp,sm,self' --mca btl_tcp_if_include net0)
    elif [[ $library == *Intel* ]]; then
        export I_MPI_FABRICS=shm:ofi FI_PROVIDER=tcp FI_TCP_IFACE=net0
        launch=(-f "$folder/mpich" -n $((hosts * ranks)) -ppn "$ranks" -iface net0
            -bootstrap ssh -bootstrap-exec "$folder/ssh")
    else
        export MPIR_CVAR_CH4_NETMOD=ofi FI_PROVIDER=tcp FI_TCP_IFACE=net0
        launch=(-f "$folder/mpich" -n $((hosts * ranks)) -launcher ssh -launcher-exec "$folder/ssh" -iface net0)
    fi
    on_host head "$mpiexec" "${launch[@]}" "$@" <&0 &
fi
job=$!
status=0
wait "$job" || status=$?
job=''
exit "$status"
