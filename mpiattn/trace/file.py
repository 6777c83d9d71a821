"""The events of all ranks in one file, in the Chrome trace format.

ui.perfetto.dev and chrome://tracing show it, too.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..commands.trace.report import flows
from ..errors import WriteError
from ..machines.reading import content
from ..machines.writing import write_text
from ..messages.message import Communicator
from .clocks import gather
from .entry import event_of, ranks_of
from .events import Event, Trace

COMPUTE, FIRST_LANE = 0, 1  # tracks of a rank: blocks, waits and phases; messages


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

    Raises
    ------
    WriteError
        On every rank, where the file could not be written.
    """
    traces, error = gather(comm, trace), None
    if traces is not None:
        try:
            write_text(file, json.dumps(document(traces)) + "\n")
        except WriteError as wrong:
            error = wrong
    if (error := comm.bcast(error)) is not None:
        raise error


def document(traces: Sequence[Trace]) -> dict[str, Any]:
    """Return the traces of all ranks as a document in the Chrome trace format.

    Each rank is a process; its first track holds phases, blocks and waits, the others messages: as many
    tracks as are under way at a time. Flow arrows lead from each send to its receive. Times in microseconds.
    """
    events: list[dict[str, Any]] = []
    last = max((event.end for trace in traces for event in trace.events if event.end == event.end), default=0.0)
    places: dict[int, dict[str, Any]] = {}

    def note(rank: int, what: str, track: int, **arguments: object) -> None:
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
            arguments: dict[str, Any] = {"peer": event.peer, "bytes": event.nbytes}
            arguments |= {"block": event.block, "owners": event.owners}
            if event.end != event.end:
                arguments["end"] = "unseen"
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
        document = json.loads(content(Path(file)))
        ranks = ranks_of(document)
        traces = [Trace() for _ in range(ranks)]
        for entry in document["traceEvents"]:
            if entry["ph"] == "X":
                rank, event = event_of(entry, ranks)
                traces[rank].events.append(event)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no trace that mpiattn wrote: {type(error).__name__}: {error}") from None
    return traces
