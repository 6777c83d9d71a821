"""Show what a file written with --trace recorded: timeline, time by phase, bytes from rank to rank.

The file has the events of all ranks on one clock, in the Chrome trace format, which ui.perfetto.dev and
chrome://tracing show too.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import message
from .message import Communicator, Tag
from .trace import Event, Trace, TracedComm

ROUND_TRIPS = 20
COMPUTE, FIRST_LANE = 0, 1  # tracks of a rank: blocks, waits and phases; messages


def clock_offset(comm: Communicator) -> float:
    """Return the seconds to add to this rank's `message.clock` to get rank 0's; all ranks call it together.

    Rank 0 asks each rank for its time. The fastest of several round trips bounds the error: half its time
    (Cristian 1989, Probabilistic clock synchronization).
    """
    here, there = np.empty(1), np.empty(1)
    offset = 0.0
    if comm.Get_rank() == 0:
        for rank in range(1, comm.Get_size()):
            best = math.inf
            for _ in range(ROUND_TRIPS):
                start = message.clock()
                comm.Send(here, rank, Tag.CLOCK)
                comm.Recv(there, rank, Tag.CLOCK)
                end = message.clock()
                if end - start < best:
                    best, offset = end - start, (start + end) / 2 - float(there[0])
            comm.Send(np.array([offset]), rank, Tag.CLOCK)
        return 0.0
    for _ in range(ROUND_TRIPS):
        comm.Recv(here, 0, Tag.CLOCK)
        there[0] = message.clock()
        comm.Send(there, 0, Tag.CLOCK)
    comm.Recv(here, 0, Tag.CLOCK)
    return float(here[0])


def gather(comm: Communicator, trace: Trace) -> list[Trace] | None:
    """Return the traces of all ranks on rank 0's clock, from 0 on; None on the other ranks."""
    comm = comm.comm if isinstance(comm, TracedComm) else comm
    offset = clock_offset(comm)
    aligned = [replace(event, start=event.start + offset, end=event.end + offset) for event in trace.events]
    gathered = comm.gather(aligned)
    if gathered is None:
        return None
    zero = min((event.start for events in gathered for event in events), default=0.0)
    for event in (event for events in gathered for event in events):
        event.start, event.end = event.start - zero, event.end - zero
    return [Trace(events) for events in gathered]


def write(comm: Communicator, trace: Trace, file: str | Path) -> None:
    """Write the events of all ranks into one file; all ranks call it together.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or TracedComm
        The communicator that was traced.
    trace : Trace
        This rank's events.
    file : path
        Chrome trace format (JSON), written by rank 0.
    """
    traces = gather(comm, trace)
    if traces is not None:
        Path(file).write_text(json.dumps(document(traces)) + "\n")


def document(traces: Sequence[Trace]) -> dict[str, Any]:
    """Return the traces of all ranks as a document in the Chrome trace format.

    Each rank is a process; its first track holds phases, blocks and waits, the others messages: as many
    tracks as are under way at a time. Flow arrows lead from each send to its receive. Times in microseconds.
    """
    events: list[dict[str, Any]] = []
    last = max((event.end for trace in traces for event in trace.events if event.end == event.end), default=0.0)
    places: dict[int, dict[str, Any]] = {}

    def note(rank: int, what: str, track: int, **arguments: Any) -> None:
        events.append({"ph": "M", "name": what, "pid": rank, "tid": track, "args": arguments})

    for rank, trace in enumerate(traces):
        note(rank, "process_name", COMPUTE, name=f"rank {rank}")
        note(rank, "process_sort_index", COMPUTE, sort_index=rank)
        busy: list[tuple[float, int]] = []  # when each track of messages is free again
        lanes = 0
        for event in sorted(trace.events, key=lambda event: (event.start, -event.end)):
            end = event.end if event.end == event.end else last  # never seen complete
            track = COMPUTE
            if event.kind in ("send", "receive"):
                if busy and busy[0][0] <= event.start:
                    track = heapq.heappop(busy)[1]
                else:
                    track, lanes = FIRST_LANE + lanes, lanes + 1
                heapq.heappush(busy, (end, track))
            arguments = {"peer": event.peer, "bytes": event.nbytes, "block": event.block}
            entry = {
                "ph": "X",
                "name": _label(event),
                "cat": event.kind,
                "pid": rank,
                "tid": track,
                "ts": event.start * 1e6,
                "dur": (end - event.start) * 1e6,
                "args": {"name": event.name}
                | {key: value for key, value in arguments.items() if value not in (-1, None)},
            }
            places[id(event)] = entry
            events.append(entry)
        note(rank, "thread_name", COMPUTE, name="compute")
        for lane in range(lanes):
            note(rank, "thread_name", FIRST_LANE + lane, name="messages" + f" {lane + 1}" * (lane > 0))
    for number, (_, sent, _, arrived) in enumerate(flows(traces)):
        tail, tip = places[id(sent)], places[id(arrived)]
        common = {"name": sent.name, "cat": "message", "id": number}
        events.append({"ph": "s", "pid": tail["pid"], "tid": tail["tid"], "ts": tail["ts"], **common})
        # Bound to the receive that encloses it: just before its end.
        place = {"pid": tip["pid"], "tid": tip["tid"], "ts": tip["ts"] + 0.999 * tip["dur"]}
        events.append({"ph": "f", "bp": "e", **place, **common})
    return {"displayTimeUnit": "ms", "otherData": {"ranks": len(traces)}, "traceEvents": events}


def _label(event: Event) -> str:
    if event.kind in ("send", "receive"):
        return f"{event.name} {'to' if event.kind == 'send' else 'from'} {event.peer}"
    if event.block:
        return f"{event.name} q {event.block[0]} kv {event.block[1]}"
    return event.name or event.kind


def read(file: str | Path) -> list[Trace]:
    """Return the traces of all ranks from a file that `write` wrote, or raise ValueError."""
    try:
        content = json.loads(Path(file).read_text())
        traces = [Trace() for _ in range(content["otherData"]["ranks"])]
        for entry in content["traceEvents"]:
            if entry["ph"] == "X":
                more, start = entry["args"], entry["ts"] / 1e6
                block = tuple(more["block"]) if "block" in more else None
                peer, nbytes = more.get("peer", -1), more.get("bytes", 0)
                event = Event(entry["cat"], more["name"], peer, nbytes, start, start + entry["dur"] / 1e6, block)
                traces[entry["pid"]].events.append(event)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} is no trace that mpiattn wrote: {error!r}") from None
    return traces


# What a trace says


def flows(traces: Sequence[Trace]) -> list[tuple[int, Event, int, Event]]:
    """Return (source, send, dest, receive) of each message: those of one tag arrive in the order of their sends."""
    sends: dict[tuple[int, int, str], list[Event]] = defaultdict(list)
    for source, trace in enumerate(traces):
        for event in trace.events:
            if event.kind == "send":
                sends[source, event.peer, event.name].append(event)
    queues = {key: iter(events) for key, events in sends.items()}
    result = []
    for dest, trace in enumerate(traces):
        for event in trace.events:
            if event.kind == "receive":
                sent = next(queues.get((event.peer, dest, event.name), iter(())), None)
                if sent is not None:
                    result.append((event.peer, sent, dest, event))
    return result


def matrix(traces: Sequence[Trace]) -> NDArray[np.int64]:
    """Return the bytes that each rank (row) sent to each other (column), counted where they arrived."""
    result = np.zeros((len(traces), len(traces)), np.int64)
    for dest, trace in enumerate(traces):
        for event in trace.events:
            if event.kind == "receive" and event.peer >= 0:
                result[event.peer, dest] += event.nbytes
    return result


def phases(traces: Sequence[Trace]) -> list[tuple[str, list[Trace]]]:
    """Return each phase's name and the events of each rank in it; the whole, unnamed, where there are none.

    Phases are matched by their order, which is the same on all ranks.
    """
    bounds = [[event for event in trace.events if event.kind == "phase"] for trace in traces]
    if not any(bounds):
        return [("", list(traces))]
    result = []
    for spans in zip(*bounds, strict=True):
        parts = []
        for trace, span in zip(traces, spans, strict=True):
            inside = [event for event in trace.events if span.start <= event.start <= span.end]
            parts.append(Trace([event for event in inside if event.kind != "phase"] + [span]))
        result.append((spans[0].name, parts))
    return result


def summary(traces: Sequence[Trace]) -> str:
    """Return a table: for each phase the time, and what the ranks did in it."""
    from tabulate import tabulate

    grouped: dict[str, list[list[float]]] = defaultdict(list)
    for name, parts in phases(traces):
        ends = [max((event.end for event in part.events), default=0.0) for part in parts]
        starts = [min((event.start for event in part.events), default=0.0) for part in parts]
        times = [end - start for start, end in zip(starts, ends, strict=True)]
        spent = {kind: [part.spent(kind) for part in parts] for kind in ("compute", "wait", "agree")}
        messages, nbytes = zip(*(part.received() for part in parts), strict=True)
        waits = spent["wait"]
        row = [max(times), _mean(spent["compute"]), _mean(spent["agree"]), _mean(waits), max(waits)]
        grouped[name].append([1e3 * value for value in row] + [sum(messages), sum(nbytes) / 1e6])
    rows = []
    for name, repeats in grouped.items():
        *values, messages, megabytes = np.median(repeats, axis=0)
        share = f"{values[3] / values[0]:.1%}" if values[0] else ""
        rows.append([name or "all", len(repeats), *values, share, int(messages), megabytes])
    headers = (
        "phase",
        "times",
        "ms",
        "compute ms",
        "agreement ms",
        "waiting ms",
        "most ms",
        "waiting",
        "messages",
        "MB",
    )
    return tabulate(rows, headers=headers, floatfmt=".2f")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


MARKS = {"compute": "#", "wait": ".", "agree": "~"}


def timeline(traces: Sequence[Trace], width: int) -> str:
    """Return a line for each rank, `width` columns wide: in each column what took most of its time."""
    events = [event for trace in traces for event in trace.events if event.kind in MARKS]
    if not events:
        return "nothing computed, nothing awaited"
    start, end = min(event.start for event in events), max(event.end for event in events)
    margin = len(f"rank {len(traces) - 1} ")
    columns = max(width - margin - 2, 10)
    edges = np.linspace(start, end, columns + 1)
    lines = []
    for rank, trace in enumerate(traces):
        shares = np.zeros((len(MARKS), columns))
        for row, kind in enumerate(MARKS):
            for event in trace.events:
                if event.kind == kind:
                    shares[row] += np.clip(
                        np.minimum(event.end, edges[1:]) - np.maximum(event.start, edges[:-1]), 0, None
                    )
        other = (end - start) / columns - shares.sum(axis=0)
        most = np.vstack([shares, other]).argmax(axis=0)
        lines.append(f"rank {rank} ".rjust(margin) + "|" + "".join([*MARKS.values(), " "][mark] for mark in most) + "|")
    scale = f"{end - start:.3g} s" if end - start >= 1 else f"{1e3 * (end - start):.3g} ms"
    lines.append(" " * margin + "|0" + scale.rjust(columns - 1) + "|")
    lines.append(" " * margin + "# compute   . waiting for messages   ~ agreeing on the input   blank: other")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn trace`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="written with --trace FILE")
    parser.add_argument("--phase", metavar="TEXT", help="the first phase alone whose name contains this text")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the timeline (png, svg, pdf)")
    parser.add_argument("--width", type=int, metavar="N", help="columns of the text timeline (default: the terminal's)")


def main(args: argparse.Namespace) -> int:
    """Print what a trace says: timeline, time by phase, bytes from rank to rank; draw it where asked."""
    from tabulate import tabulate

    try:
        traces = read(args.file)
        if args.phase is not None:
            names = [name for name, _ in phases(traces)]
            if not any(args.phase in name for name in names):
                known = ", ".join(dict.fromkeys(names))
                raise ValueError(f"no phase of {args.file} contains {args.phase!r}: choose from {known}")
            traces = next(parts for name, parts in phases(traces) if args.phase in name)
    except (OSError, ValueError) as error:
        print(f"mpiattn trace: error: {error}", file=sys.stderr)
        return 2
    bytes_sent = matrix(traces)
    unit, divisor = ("MB", 1e6) if bytes_sent.max(initial=0) >= 1e6 else ("kB", 1e3)
    table = [
        [f"{source}", *(f"{value / divisor:.4g}" if value else "" for value in row)]
        for source, row in enumerate(bytes_sent)
    ]
    print(timeline(traces, args.width or shutil.get_terminal_size().columns), end="\n\n")
    print(summary(traces), end="\n\n")
    print(f"{unit} from rank (row) to rank (column), {bytes_sent.sum() / divisor:.4g} in all")
    print(tabulate(table, headers=["", *map(str, range(len(traces)))], disable_numparse=True, stralign="right"))
    if args.plot:
        from .figures import draw_trace

        names = [name for name, _ in phases(traces)]
        draw_trace(traces, args.plot, names[0] if len(names) == 1 else "")
    return 0
