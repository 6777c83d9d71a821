"""mpiattn.watch: a job that is stuck says who waits for whom, and ends."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_table import NETWORK
from fault_table import run as run_table
from launch import mpiexec, mpiexec_path

from mpiattn.trace.file import read as read_trace
from mpiattn.trace.watch.cause import cause
from mpiattn.trace.watch.graph import edges
from mpiattn.trace.watch.record import CAPACITY, Kind, Recorder, State, Steps
from mpiattn.trace.watch.report import report
from mpiattn.trace.watch.state import Doing, Wait, read

PROGRAM = Path(__file__).parent / "faulty.py"
SECONDS = 2.0
LATE = 15.0  # seconds after the timeout in which a job has to end, on a machine that does other things too
KV = 2

CAUSES = {
    # The launcher kills the others at once: where nothing tells who was first, all are named.
    "kill": r"cause: (rank 2 \(\S+, process \d+\) is gone: killed|"
    r".*rank 2 \(\S+, process \d+\) is gone.*: which of them was the first to fail is not known)",
    "stop": r"cause: rank 2 \(.*, process \d+\) is stopped: kill -CONT \d+",
    "exception": r"cause: rank 2 .* raised an exception: ArithmeticError: something went wrong on this rank alone",
    "loop": r"cause: rank \d waits for .* rank 2; rank 2 .* makes no step .*(.*\n)*.*in loop: (while True|pass)",
    "order": r"in a circle: .*rank [01] waits for Allgather no. \d+ with rank 2.*rank 2 waits for Barrier|"
    r"in a circle: rank 2 waits for Barrier no. \d+ with rank \d, rank \d waits for Allgather no. \d+ with rank 2",
    "receive": r"rank 2 waits for D_O no. 1 from rank 0",
}


BIN = Path(sys.executable).parent
PARTS = {
    "ompi_info": ("kill", "stop", "order"),
    "impi_info": ("kill", "stop", "loop"),
}
"""Faults that are tried with an MPI library, by a program that comes with it; with MPICH all."""

TRIED = next((part for program, part in PARTS.items() if (BIN / program).exists()), tuple(CAUSES))


def run(fault: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Return how the job ended, and how many seconds after the fault."""
    done = mpiexec(3, sys.executable, PROGRAM, fault, "--seconds", str(SECONDS), "--file", str(folder / "stuck.json"))
    [begun] = re.findall(r"fault at ([\d.]+)", done.stdout)
    return done, time.time() - float(begun)


@pytest.mark.parametrize("fault", TRIED)
def test_a_fault_is_named_and_ends_the_job(fault: str, tmp_path: Path) -> None:
    done, seconds = run(fault, tmp_path)
    assert done.returncode != 0
    assert re.search(CAUSES[fault], done.stderr), done.stderr
    assert done.stderr.count("mpiattn.watch: ") == done.stderr.count("cause: ") == 1, done.stderr
    assert seconds < SECONDS + LATE
    if fault not in ("kill", "exception"):
        assert re.search(r"rank 0 on .*: .*has waited \d+\.\d s for", done.stderr), done.stderr
    traces = read_trace(tmp_path / "stuck.json")
    assert len(traces) == 3
    names = {event.name for trace in traces for event in trace.events if event.kind == "receive"}
    assert "KV" in names


@pytest.mark.skipif(tuple(CAUSES) != TRIED, reason="with MPICH; the others are in docs/faults.md")
def test_a_link_that_is_cut_is_named_and_ends_the_job() -> None:
    check = subprocess.run([NETWORK, "--hosts", "1", "--check"], capture_output=True, text=True)
    if check.returncode:
        pytest.skip(check.stderr.strip())
    outcome = run_table("cut", mpiexec_path(), sys.executable, SECONDS)
    assert outcome.status != 0 and outcome.seconds < SECONDS + LATE
    assert re.search(r"cause: no word from rank 2 \(node3, process \d+\)", outcome.text), outcome.text
    assert re.search(r"rank 0 on node1: .*has waited", outcome.text), outcome.text


def test_another_shape_is_an_error_on_every_rank(tmp_path: Path) -> None:
    done, _ = run("shape", tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("InputError: k on rank 2 is float32 (1, 1, 1000, 3), on rank 0") == 3
    assert "mpiattn.watch" not in done.stderr


def test_nothing_is_said_where_nothing_is_wrong(tmp_path: Path) -> None:
    words = ("--seconds", "0.5", "--calls", "50")
    done = mpiexec(3, sys.executable, PROGRAM, "none", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the end" in done.stdout and list(tmp_path.iterdir()) == []


def test_a_command_that_is_stuck_ends(tmp_path: Path) -> None:
    words = ("compare", "--algorithms", "ring", "--iterations", "100000", "--tokens", "64", "--timeout", "2")
    code = "import os, signal, sys, threading; from mpiattn.commands.cli import main, world\n"
    code += "if world().rank == 1: threading.Timer(2, os.kill, (os.getpid(), signal.SIGSTOP)).start()\n"
    done = mpiexec(2, sys.executable, "-c", code + "sys.exit(main())", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert re.search(r"cause: rank 1 \(.*\) is stopped", done.stderr), done.stderr
    assert len(read_trace(tmp_path / "mpiattn-stuck.json")) == 2


@pytest.mark.parametrize(
    ("words", "text"), [(["--timeout", "soon"], "--timeout"), (["--timeout", "-1"], "-1 is no number")]
)
def test_wrong_timeouts(words: list[str], text: str) -> None:
    done = mpiexec(1, sys.executable, "-m", "mpiattn", "env", *words)
    assert done.returncode == 2 and text in done.stderr


def waiting(rank: int, *waits: Wait, **more: object) -> Doing:
    comms = {"comm#0": ("comm", (0, 1, 2))}
    return Doing(rank, "here", 100 + rank, "running", 9.0, waiting=bool(waits), waits=list(waits), comms=comms, **more)  # type: ignore[arg-type]


def receives(peer: int) -> Wait:
    return Wait("receive", "KV", "comm#0", peer, 1, 80)


def named(ranks: list[Doing]) -> str:
    by_rank = {doing.rank: doing for doing in ranks}
    text = report(by_rank, "no step for 9 s", "stuck.json")
    assert cause(by_rank, edges(by_rank))[1][0] in text
    return text


def test_a_circle_is_found() -> None:
    text = named([waiting(0, receives(1)), waiting(1, receives(2)), waiting(2, receives(1))])
    assert "in a circle: rank 1 waits for KV no. 1 from rank 2, rank 2 waits for KV no. 1 from rank 1" in text
    assert "rank 0 on here: has waited 9.0 s for KV no. 1 (80 bytes) from rank 1, which has not sent it" in text


def test_the_end_of_the_way_is_found() -> None:
    text = named([waiting(0, receives(1)), waiting(1, receives(2)), waiting(2, passes=["ring forward"], step=3)])
    assert re.search("rank 1 waits for KV no. 1 from rank 2; rank 2 .* makes no step in ring forward", text)


def test_a_message_under_way_is_the_network_s() -> None:
    text = named([waiting(0, receives(1)), waiting(1, receives(2), posted={"send comm#0 0 KV": 1}), waiting(2)])
    assert "rank 1 waits for KV no. 1 from rank 2; rank 2" in text  # the way is followed past it
    both = [waiting(0, receives(1)), waiting(1, posted={"send comm#0 0 KV": 1}), waiting(2)]
    assert "from rank 1 to rank 0 is posted on both sides and does not arrive: a slow or broken network" in named(both)


def test_a_collective_that_not_all_come_to() -> None:
    barrier = Wait("collective", "Barrier", "comm#0", -1, 4, 0)
    came = {"called": {"comm#0": (4, "Barrier")}}
    text = named(
        [waiting(0, barrier, **came), waiting(1, barrier, **came), waiting(2, called={"comm#0": (3, "bcast")})]
    )
    assert "Barrier no. 4 on comm, to which rank 2 has not come" in text
    assert "rank 0 waits for Barrier no. 4 with rank 2; rank 2" in text


def test_different_collectives_are_found() -> None:
    barrier, bcast = (Wait("collective", name, "comm#0", -1, 4, 0) for name in ("Barrier", "bcast"))
    ranks = [waiting(rank, barrier, called={"comm#0": (4, "Barrier")}) for rank in (0, 1)]
    text = named([*ranks, waiting(2, bcast, called={"comm#0": (4, "bcast")})])
    assert re.search("rank 0 .* calls Barrier, rank 2 .* calls bcast, as no. 4 of the collectives on comm", text)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "0.steps", {KV: "KV"})
    comm = recorder.comm("comm", (0, 1))
    steps = Steps(tmp_path / "0.steps")
    for post in range(1, CAPACITY):  # more records than there is room for
        recorder.write(Kind.PASS, recorder.name("ring forward"), 0, 0, 0, 0, 0)
        recorder.write(Kind.RECEIVE, KV, comm, 1, post, post, 8)
        recorder.write(Kind.WAIT, 0, 0, 1, 0, post, 1)
        recorder.write(Kind.DONE, 0, 0, 0, 0, 0, 0)
        recorder.write(Kind.END, recorder.name("ring forward"), 0, 0, 0, 0, 0)
    recorder.write(Kind.PASS, recorder.name("ring backward"), 0, 0, 0, 0, 0)
    recorder.write(Kind.SEND, KV, comm, 1, 1, CAPACITY, 8)
    recorder.write(Kind.RECEIVE, KV, comm, 1, CAPACITY, CAPACITY + 1, 8)
    recorder.write(Kind.WAIT, 0, 0, 1, 0, CAPACITY, 0b11)
    doing = read(steps, Doing(0, "here", 1, "running"), time.monotonic())
    assert doing.passes == ["ring backward"] and doing.waiting and doing.step == 1
    assert [(wait.kind, wait.number) for wait in doing.waits] == [("send", 1), ("receive", CAPACITY)]
    assert steps.state == State.WATCHED
    recorder.state(State.RAISED, "ValueError: no")
    assert read(steps, Doing(0, "here", 1, "running"), 0).error == "ValueError: no"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.steps").write_bytes(bytes(2**20))
    with pytest.raises(ValueError, match="has no records"):
        Steps(tmp_path / "0.steps")
