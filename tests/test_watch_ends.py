"""Which rank was the first to end: named where it is certain, else all that may have been it.

Nothing here depends on timing: the processes in the place of ranks have ended before the watch looks.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpiattn.trace.watch.cause import cause
from mpiattn.trace.watch.ended import first, mark, shift
from mpiattn.trace.watch.graph import edges
from mpiattn.trace.watch.host import DUMP
from mpiattn.trace.watch.monitor import Monitor
from mpiattn.trace.watch.record import Recorder
from mpiattn.trace.watch.state import Doing, Wait
from mpiattn.trace.watch.wires import in_order

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a watch sees no process end")

DOUBT = "which of them was the first to fail is not known"
RANK = "trap '' {dump}; {wire} echo ready; exec sleep 300"
HELD = "mkfifo {rank}.wire; exec 9<>{rank}.wire;"

Ended = Callable[..., str]


@pytest.fixture
def ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Ended]:
    """Return a function that ends some of three ranks, one after the other, and returns what their watch says."""
    processes: list[subprocess.Popen[str]] = []

    def report(*ranks: int, wires: str = "") -> str:
        folder = tmp_path / "watch"
        folder.mkdir()
        for rank in range(3):
            Recorder(folder / f"{rank}.steps", {})
            (folder / f"{rank}.stack").touch()
            held = HELD.format(rank=rank) if str(rank) in wires else ""
            words = ["sh", "-c", RANK.format(dump=int(DUMP), wire=held)]
            processes.append(subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True))
            assert processes[-1].stdout and processes[-1].stdout.readline() == "ready\n"
        pids = [process.pid for process in processes]
        settings = {"name": "here", "folder": folder, "seconds": 5, "file": str(tmp_path / "stuck.json"), "hosts": 1}
        monitor = Monitor({**settings, "ranks": list(enumerate(pids))})
        for rank in ranks:
            os.kill(pids[rank], signal.SIGKILL)
            os.waitid(os.P_PID, pids[rank], os.WEXITED | os.WNOWAIT)  # over, and not yet reaped
        with contextlib.closing(monitor.selector):
            assert monitor.run() == 1
        for watched in monitor.host.ranks:
            watched.stack.close()
        return capfd.readouterr().err

    yield report
    for process in processes:
        process.kill()
        process.communicate()


@linux
def test_one_end_is_named_alone(ended: Ended) -> None:
    text = ended(2)
    assert re.search(r"watch: rank 2 is gone; .*\n  cause: rank 2 \(here, process \d+\) is gone: killed", text), text
    assert text.count("is gone") == 2


@linux
def test_of_two_ends_without_an_order_both_are_named(ended: Ended) -> None:
    text = ended(1, 2)
    assert "mpiattn.watch: ranks 1 and 2 are gone; the job ends." in text
    both = r"cause: rank 1 \(here, process \d+\) is gone, rank 2 \(here, process \d+\) is gone: which .* is not known"
    assert re.search(both, text), text
    assert text.count("cause: ") == 1


@linux
@pytest.mark.parametrize("order", [(2, 1), (2, 1, 0), (1, 0, 2)])
def test_wires_tell_the_order(order: tuple[int, ...], ended: Ended) -> None:
    text = ended(*order, wires="012")
    assert re.search(rf"cause: rank {order[0]} \(here, process \d+\) is gone: killed", text), text
    assert text.count("is gone") == 2 and text.count("ended by the launcher") == len(order) - 1


@linux
def test_a_rank_without_a_wire_may_have_been_the_first(ended: Ended) -> None:
    text = ended(1, 2, wires="01")
    assert re.search(rf"cause: rank 1 .* is gone, rank 2 .* is gone: {DOUBT}", text), text


@linux
def test_files_of_a_process_are_closed_from_the_highest_number_down() -> None:
    assert in_order()


def gone(rank: int, well: float = -math.inf, ill: float = math.inf, status: str = "gone", **more: object) -> Doing:
    return Doing(rank, "here", 100 + rank, status, well=well, ill=ill, **more)  # type: ignore[arg-type]


def causes(*ranks: Doing) -> tuple[list[int], list[str]]:
    by_rank = {doing.rank: doing for doing in ranks}
    mark(by_rank)
    return cause(by_rank, edges(by_rank))


def test_who_was_well_when_another_one_was_not_is_not_the_first() -> None:
    assert first({1: gone(1, 5.0, 6.0), 2: gone(2, 3.0, 4.0)}) == [2]
    assert first({1: gone(1, 4.0, 4.5), 2: gone(2, 3.0, 4.0)}) == [2]
    assert first({1: gone(1, 3.5, 6.0), 2: gone(2, 3.0, 4.0)}) == [1, 2]
    assert first({1: gone(1), 2: gone(2)}) == [1, 2]
    assert first({0: gone(0, 1.0, 3.2), 1: gone(1, 3.1, 9.0), 2: gone(2, 3.3, 4.0)}) == [0, 1]


def test_who_has_left_and_ended_may_have_failed_afterwards() -> None:
    assert first({0: gone(0, 1.0, 2.0, "left"), 2: gone(2, 3.0, 4.0)}) == [2, 0]
    assert first({0: gone(0, 5.0, 6.0, "left"), 2: gone(2, 3.0, 4.0)}) == [2]
    assert first({0: gone(0, status="left"), 2: gone(2, 3.0, 4.0)}) == [2]  # its process goes on
    assert first({0: gone(0, 1.0, 2.0, "left"), 2: gone(2, status="running")}) == []


def test_all_that_may_have_been_the_first_are_named() -> None:
    assert causes(gone(1, 5.0, 6.0), gone(2, 3.0, 4.0)) == (
        [2],
        ["rank 2 (here, process 102) is gone: killed, or ended without a word"],
    )
    raised = gone(0, 3.0, 4.0, "raised", error="mpi4py.MPI.Exception: no")
    unknown = gone(1, status="unknown")
    culprits, [text] = causes(raised, unknown, gone(2, 3.0, 4.0))
    assert culprits == [2, 1, 0]
    assert text == (
        "rank 2 (here, process 102) is gone, no word from rank 1 (here, process 101), rank 0 (here, process 100) "
        f"raised an exception: mpi4py.MPI.Exception: no: {DOUBT}"
    )


def test_whom_the_others_waited_for_is_said() -> None:
    waits = [Wait("receive", "KV", "comm#0", 2, 1, 80)]
    culprits, [text] = causes(gone(1, waiting=True, waits=waits), gone(2))
    assert culprits == [1, 2] and text.endswith(f"{DOUBT}; the others waited for rank 2")


def test_times_of_another_host_are_taken_as_wide_as_they_may_be() -> None:
    # Its clock is 100 behind, of which this host knows only that a question and its answer took 0.5 together.
    doing = shift(gone(2, 10.0, 10.25), sent=110.0, asked=10.25, said=10.5, heard=110.75)
    assert (doing.well, doing.ill) == (109.75, 110.5)
    assert first({1: gone(1, 110.5, 111.0), 2: doing}) == [2]
    assert first({1: gone(1, 110.25, 111.0), 2: doing}) == [1, 2]
