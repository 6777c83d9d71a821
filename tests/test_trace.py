"""Traces: the order that was executed is the schedule's, clocks agree, and what is written says what happened."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpiattn import ALGORITHMS, Causal, Full, MeshAttention, machines, scatter, virtual
from mpiattn.commands.trace import command as trace_command
from mpiattn.commands.trace import report
from mpiattn.commands.trace.figure import draw_trace
from mpiattn.errors import InputError
from mpiattn.messages import message
from mpiattn.schedule.steps import Op, Step
from mpiattn.trace import file
from mpiattn.trace.clocks import gather
from mpiattn.trace.comm import TracedComm
from mpiattn.trace.events import Event, Trace

if TYPE_CHECKING:
    from mpi4py import MPI

TAGS = {Op.Q: "Q", Op.KV: "KV", Op.O: "O", Op.DQ: "D_Q", Op.DKV: "D_KV"}


def run(comm: Any, name: str, tokens: int = 24, **arguments: Any) -> tuple[Any, Trace]:
    """Run an algorithm forward and backward, each a phase; return it and its trace."""
    traced = TracedComm(comm)
    attention = ALGORITHMS[name](traced, layout="striped", **arguments)
    rng = np.random.default_rng(0)
    wholes = {key: rng.standard_normal((1, 2, tokens, 8)) for key in ("q", "k", "v", "out")}
    shapes = {key: whole.shape for key, whole in wholes.items()}
    q, k, v, d_out = (
        scatter(whole if comm.Get_rank() == 0 else None, comm, attention.owned(key, shapes))
        for key, whole in wholes.items()
    )
    with traced.trace.phase("forward"):
        _, saved = attention.forward(q, k, v)
    with traced.trace.phase("backward"):
        attention.backward(d_out, saved)
    attention.free()
    return attention, traced.trace


def executed(events: list[Event]) -> list[Any]:
    """Return messages, as the name of what is sent and received, and blocks, in the order in which they began."""
    order: list[Any] = [
        event.name if event.kind in ("send", "receive") else event.block
        for event in events
        if event.kind in ("send", "receive", "compute")
    ]
    # A step sends and receives one thing: two events, one entry.
    return [entry for entry, run in groupby(order) for _ in range(len(list(run)) if isinstance(entry, tuple) else 1)]


def scheduled(attention: MeshAttention, steps: tuple[Step, ...]) -> list[Any]:
    """Return the same from the schedule: slots are chunks that came so many hops.

    A rank's own block is in two parts, with the first and the last message, where one of these has no other block.
    """
    problem = attention.problem
    assert problem is not None
    order: list[Any] = []
    parted = len(steps) > 1 and not (steps[0].blocks and steps[-1].blocks)
    own_rank = attention.q_owners[0]
    halves = [problem.q_positions[own_rank][rows] for rows in problem.halves(own_rank)]
    for number, step in enumerate(steps):
        if step.message:
            order.append(TAGS[step.message])
        own = [halves[0 if number == 0 else 1]] if parted and number in (0, len(steps) - 1) else []
        blocks = [(attention.q_owners[j], attention.kv_owners[i]) for i, j in step.blocks if not parted or i or j]
        queries = [(problem.q_positions[q], kv) for q, kv in blocks] + [(part, attention.kv_owners[0]) for part in own]
        order += [(int(positions[0]), int(problem.kv_positions[kv][0])) for positions, kv in queries]
    return [entry for entry, _ in groupby(order)]


@pytest.mark.mpi(sizes=[2, 4, 6, 8, 9])
def test_executed_order_is_the_schedule(comm: MPI.Intracomm) -> None:
    for rows in (rows for rows in range(1, comm.size + 1) if comm.size % rows == 0):
        attention, record = run(comm, "mesh", rows=rows, mask=Full())
        (_, (forward,)), (_, (backward,)) = report.phases([record])
        steps = tuple(step for step, _ in attention.forward_steps)
        assert executed(forward.events) == scheduled(attention, steps)
        assert executed(backward.events) == scheduled(attention, tuple(step for step, _ in attention.backward_steps))
        blocks = [event.block for event in forward.events if event.kind == "compute"]
        parted = not (steps[0].blocks and steps[-1].blocks)
        assert len(set(blocks)) == len(blocks) == comm.size + parted, "each block once"


@pytest.mark.mpi(min_size=2, max_size=4)
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_all_that_is_received_is_in_the_matrix_and_the_file(comm: MPI.Intracomm, mpi_tmp_path: Path, name: str) -> None:
    _, record = run(comm, name, mask=Causal())
    received = comm.gather(record.received()[1])
    file.write(comm, record, mpi_tmp_path / "trace.json")
    traces = gather(comm, record)
    if traces is not None:
        matrix = report.matrix(traces)
        assert matrix.sum(axis=0).tolist() == received
        assert not matrix.diagonal().any()
        again = file.read(mpi_tmp_path / "trace.json")
        assert (report.matrix(again) == matrix).all()
        for one, other in zip(traces, again, strict=True):
            events = sorted(one.events, key=lambda event: (event.start, -event.end))
            assert len(events) == len(other.events)
            for a, b in zip(events, sorted(other.events, key=lambda event: (event.start, -event.end)), strict=True):
                assert a.kind == b.kind
                # Aligned twice, by two measurements: times may differ a little, durations not.
                assert a.end - a.start == pytest.approx(b.end - b.start, abs=1e-8)


@pytest.mark.mpi(min_size=2, max_size=6)
def test_clocks_are_aligned(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = 1000.0 * comm.rank
    monkeypatch.setattr(message, "clock", lambda: time.perf_counter() + ahead)
    _, record = run(comm, "ring")
    traces = gather(comm, record)
    if traces is not None:
        arrows = report.flows(traces)
        assert len(arrows) == sum(one.received()[0] for one in traces) > 0
        for _, sent, _, arrived in arrows:
            assert sent.nbytes == arrived.nbytes
            # No message arrives before it leaves, but for the error of the alignment.
            assert -0.005 < arrived.end - sent.start < 60
        assert max(event.end for one in traces for event in one.events) < 60


def test_the_trace_of_virtual_ranks(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    virtual.run(3, machines.load("laptop"), lambda comm: file.write(comm, run(comm, "ring")[1], path))
    traces = file.read(path)
    assert [trace.received()[0] for trace in traces] == [2 + 4] * 3
    for _, sent, _, arrived in report.flows(traces):
        assert arrived.end > sent.start


@pytest.mark.mpi(sizes=[2, 4])
def test_file_is_what_perfetto_reads(comm: MPI.Intracomm, mpi_tmp_path: Path) -> None:
    _, record = run(comm, "mesh")
    file.write(comm, record, mpi_tmp_path / "trace.json")
    if comm.rank == 0:
        entries = json.loads((mpi_tmp_path / "trace.json").read_text())["traceEvents"]
        tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for entry in entries:
            if entry["ph"] == "X":
                tracks[entry["pid"], entry["tid"]].append(entry)
        assert {rank for rank, _ in tracks} == set(range(comm.size))
        for (_, track), slices in tracks.items():
            assert {"send", "receive"}.isdisjoint(entry["cat"] for entry in slices) == (track == file.COMPUTE)
            slices.sort(key=lambda entry: (entry["ts"], -entry["dur"]))
            open_ends: list[float] = []
            for entry in slices:  # slices of a track nest or follow each other, or Perfetto drops them
                while open_ends and open_ends[-1] <= entry["ts"] + 1e-3:
                    open_ends.pop()
                assert not open_ends or entry["ts"] + entry["dur"] <= open_ends[-1] + 1e-3
                open_ends.append(entry["ts"] + entry["dur"])
        arrows = [entry for entry in entries if entry["ph"] in "sf"]
        assert len(arrows) == 2 * sum(entry.get("cat") == "receive" for entry in entries)
        for start, end in zip(arrows[::2], arrows[1::2], strict=True):
            assert (start["ph"], end["ph"], start["id"]) == ("s", "f", end["id"])
            for arrow, kind in ((start, "send"), (end, "receive")):
                inside = [
                    entry
                    for entry in tracks[arrow["pid"], arrow["tid"]]
                    if entry["ts"] <= arrow["ts"] <= entry["ts"] + entry["dur"]
                ]
                assert [entry["cat"] for entry in inside] == [kind]
                assert inside[0]["args"]["name"] == arrow["name"]


@pytest.mark.slow
@pytest.mark.mpi(sizes=[2])
def test_tracing_costs_little(comm: MPI.Intracomm) -> None:
    rng = np.random.default_rng(comm.rank)
    q, k, v = rng.standard_normal((3, 1, 4, 512, 64), np.float32)
    traced = TracedComm(comm)
    with ALGORITHMS["ring"](comm) as plain, ALGORITHMS["ring"](traced) as recorded:
        ratios = []
        for number in range(42):
            seconds = []
            for attention in (plain, recorded) if number % 2 else (recorded, plain):
                comm.Barrier()
                start = time.perf_counter()
                attention.forward(q, k, v)
                seconds.append(comm.allreduce(time.perf_counter() - start))
            ratios.append(seconds[1] / seconds[0] if number % 2 else seconds[0] / seconds[1])
    assert statistics.median(ratios) < 1.03


# Without MPI: traces made by hand


def ring_of(ranks: int) -> list[Trace]:
    """Return traces of ranks that each compute, send 1,000 bytes to the next, and wait, in two phases."""
    traces = []
    for rank in range(ranks):
        events = []
        for phase, start in (("first", 0.0), ("second", 10.0)):
            events += [
                Event("phase", phase, -1, 0, start, start + 8),
                Event("send", "KV", (rank + 1) % ranks, 1000, start + 1, start + 7),
                Event("receive", "KV", (rank - 1) % ranks, 1000, start + 1, start + 7),
                Event("compute", "forward", -1, 0, start + 1, start + 5, (rank, rank)),
                Event("wait", "", -1, 0, start + 5, start + 7 - rank * 0.5),
            ]
        traces.append(Trace(events))
    return traces


def write(traces: list[Trace], folder: Path) -> Path:
    path = folder / "trace.json"
    path.write_text(json.dumps(file.document(traces)))
    return path


def command(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    trace_command.add_arguments(parser)
    return trace_command.main(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("ranks", [1, 4, 16])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_text_timeline_fits(ranks: int, width: int) -> None:
    lines = report.timeline(ring_of(ranks), width).splitlines()
    assert max(map(len, lines[: ranks + 1])) <= width
    assert [line.split("|")[0].strip() for line in lines[:ranks]] == [f"rank {rank}" for rank in range(ranks)]
    bars = lines[0].split("|")[1]
    # Rank 0 computes 8 of 17 parts (the first begins when it computes), waits 4, and does nothing else in between.
    assert bars.count("#") / len(bars) == pytest.approx(8 / 16, abs=0.1)
    assert bars.count(".") / len(bars) == pytest.approx(4 / 16, abs=0.1)


def test_waiting_by_phase() -> None:
    (first, parts), (second, _) = report.phases(ring_of(3))
    assert (first, second) == ("first", "second")
    assert [part.waited() for part in parts] == [2.0, 1.5, 1.0]
    table = report.summary(ring_of(3))
    assert "1500.00" in table and "2000.00" in table  # mean and most, ms


def test_an_unfinished_message_ends_with_the_trace() -> None:
    traces = [Trace([Event("compute", "forward", -1, 0, 0.0, 2.0), Event("send", "Q", 0, 8, 1.0)])]
    entries = file.document(traces)["traceEvents"]
    (sent,) = (entry for entry in entries if entry.get("cat") == "send")
    assert sent["ts"] + sent["dur"] == 2e6
    json.dumps(entries, allow_nan=False)


def test_messages_under_way_together_have_tracks_of_their_own() -> None:
    entries = file.document(ring_of(2))["traceEvents"]
    tracks: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        if entry.get("cat") in ("send", "receive"):
            tracks[entry["pid"], entry["tid"]].append(entry)
    assert len(tracks) == 4  # of two ranks, two each: the second phase's reuse the first's
    for slices in tracks.values():
        for one, other in pairwise(sorted(slices, key=lambda entry: entry["ts"])):
            assert one["ts"] + one["dur"] <= other["ts"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_command_prints_and_draws(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = write(ring_of(4), tmp_path)
    assert command(path, "--plot", tmp_path / f"t.{suffix}", "--width", "70") == 0
    out = capsys.readouterr().out
    assert "rank 3 |" in out and "first" in out and "kB from rank (row) to rank (column), 8 in all" in out
    assert (tmp_path / f"t.{suffix}").stat().st_size > 5000


def test_command_shows_one_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(ring_of(4), tmp_path)
    assert command(path, "--phase", "sec") == 0
    out = capsys.readouterr().out
    assert "second" in out and "first" not in out and "4 in all" in out
    with pytest.raises(InputError, match="choose from first, second"):
        command(path, "--phase", "third")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"otherData": {"ranks": 1}, "traceEvents": [{"ph": "X"}]}'])
def test_command_refuses_other_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    with pytest.raises(InputError, match="No such file"):
        command(path)
    path.write_text(content)
    with pytest.raises(InputError, match="is no trace that mpiattn wrote"):
        command(path)


def test_a_binary_file_is_no_trace_and_is_not_printed(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff" * 10000)
    with pytest.raises(ValueError, match="is no trace that mpiattn wrote") as hit:
        file.read(tmp_path / "binary")
    assert len(str(hit.value)) < 400


def test_nothing_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.timeline([Trace(), Trace()], 80)
    assert report.summary([Trace(), Trace()])
    draw_trace([[Trace(), Trace()]], tmp_path / "empty.png", [""])
