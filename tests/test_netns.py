"""run/netns.sh: several hosts with slow links on this machine. Skipped without root, or where the kernel won't."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from launch import inherited, mpiexec_path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "run" / "netns.sh"

pytestmark = pytest.mark.launch  # with each MPI library


@cache
def missing() -> str | None:
    """Return why namespaces can't be made here, None if they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    done = subprocess.run([SCRIPT, "--hosts", "1", "--rate", "1gbit", "--check"], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip()


@pytest.fixture(autouse=True)
def namespaces() -> None:
    if reason := missing():
        pytest.skip(reason)


def start(*words: object) -> subprocess.Popen[str]:
    argv = [str(word) for word in (SCRIPT, "--mpiexec", mpiexec_path(), *words)]
    environment = inherited() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE

    def heed() -> None:
        # A job in the background, as of continuous integration, ignores it, and a shell can't undo that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=heed
    )


def run(*words: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the script; at the time limit end it in the way that lets it clean up."""
    with start(*words) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            out, err = process.communicate(timeout=20)
            pytest.fail(f"still ran after {timeout} s\n{out}\n{err}")
        assert not left(process.pid), "namespaces left"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def left(pid: int) -> list[str]:
    """Return the namespaces that a run of the script has now."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"mpiattn-{pid}-")]


PYTHON = sys.executable


def test_each_rank_is_on_a_host_of_its_own() -> None:
    text = (
        "import socket; from mpi4py import MPI; "
        "print(MPI.COMM_WORLD.gather(socket.gethostname()) or '', end='', flush=True)"
    )
    done = run("--hosts", 3, PYTHON, "-c", text)
    assert done.returncode == 0, done.stderr
    assert done.stdout == str(["node1", "node2", "node3"])


def test_several_ranks_on_a_host() -> None:
    text = (  # one rank prints: lines of several may run together
        "from mpi4py import MPI; c = MPI.COMM_WORLD; sizes = c.gather(c.Split_type(MPI.COMM_TYPE_SHARED).size)\n"
        "if c.rank == 0: print(c.size, sizes)"
    )
    done = run("--hosts", 2, "--ranks", 2, PYTHON, "-c", text)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4 [2, 2, 2, 2]\n"


def test_links_have_the_rate() -> None:
    text = """
import time, numpy
from mpi4py import MPI
comm = MPI.COMM_WORLD
near, far = numpy.ones((2, 2**19), numpy.uint8)
for _ in range(3):
    comm.Barrier()
    start = time.perf_counter()
    requests = [comm.Irecv(far, 1 - comm.rank), comm.Isend(near, 1 - comm.rank)]
    MPI.Request.Waitall(requests)
    seconds = time.perf_counter() - start
slowest = comm.allreduce(seconds, MPI.MAX)
print(slowest if comm.rank == 0 else "", end="", flush=True)
"""
    done = run("--hosts", 2, "--rate", "20mbit", PYTHON, "-c", text)
    assert done.returncode == 0, done.stderr
    seconds = float(done.stdout.split()[0])
    # 0.21 s by the rate, less what a bucket of 64 kB lets pass at once; a busy machine only makes it longer.
    assert 0.17 < seconds < 2


def test_messages_take_the_latency() -> None:
    text = """
import time, numpy
from mpi4py import MPI
comm = MPI.COMM_WORLD
byte = numpy.zeros(1, numpy.uint8)
for _ in range(5):
    comm.Barrier()
    start = time.perf_counter()
    for sender in (0, 1):
        comm.Send(byte, 1 - sender) if comm.rank == sender else comm.Recv(byte, sender)
    seconds = time.perf_counter() - start
slowest = comm.allreduce(seconds / 2, MPI.MAX)
print(slowest if comm.rank == 0 else "", end="", flush=True)
"""
    done = run("--hosts", 2, "--latency", "100ms", PYTHON, "-c", text)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert 0.09 < float(done.stdout.split()[0]) < 1


def test_the_status_of_the_command_is_the_script_s() -> None:
    done = run("--hosts", 2, PYTHON, "-c", "raise SystemExit(7)")
    assert done.returncode == 7


def test_a_command_on_one_host() -> None:
    done = run("--hosts", 2, "--host", "node2", "sh", "-c", "hostname; ip -br address show dev net0; exit 4")
    assert done.returncode == 4
    assert done.stdout.startswith("node2\n") and "10.77.0.2/24" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    with start("--hosts", 2, PYTHON, "-c", "import time; print('up', flush=True); time.sleep(50)") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("up")  # lines of two ranks can come as one
        assert len(left(process.pid)) == 3
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode in (128 + number, -number)
        assert not left(process.pid)


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    with start("--hosts", 1, "--host", "node1", "sleep", "50") as process:
        while len(left(process.pid)) < 2:
            time.sleep(0.05)
        process.kill()
        process.wait()
        spaces = left(process.pid)
        assert run("--hosts", 1, "--check").returncode == 0
        assert spaces and not left(process.pid)


def test_algorithms_are_exact_over_the_network() -> None:
    words = ("-m", "mpiattn", "compare", "--algorithms", "ring,mesh", "--layout", "zigzag", "--tokens", "256")
    done = run("--hosts", 4, "--rate", "200mbit", PYTHON, *words, "--iterations", "1", timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ok\n") == 4  # the ring and the grids 1x4, 2x2, 4x1


def test_the_shared_ring_refuses_several_hosts() -> None:
    words = ("-m", "mpiattn", "compare", "--algorithms", "shared_ring", "--tokens", "64")
    done = run("--hosts", 2, PYTHON, *words)
    assert done.returncode == 2
    assert done.stderr.count("needs all 2 ranks on one host") == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--hosts", "0", "true"], "--hosts takes a number from 1"),
        (["--rate", "fast", "true"], "--rate takes a rate"),
        (["--latency", "5", "true"], "--latency takes a time"),
        (["--speed", "true"], "unknown option --speed"),
        ([], "no command"),
    ],
)
def test_wrong_options(words: list[str], text: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
