"""Report on the traces of all ranks: timeline, time by phase, bytes from rank to rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...trace.events import Event, Flow, Trace
from .. import terminal


def flows(traces: Sequence[Trace]) -> list[Flow]:
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


DROP = ("agreement ms", "most ms", "times", "compute ms")
"""Columns of the summary that a narrow terminal can do without."""


def summary(traces: Sequence[Trace]) -> str:
    """Return a table: for each phase the time, and what the ranks did in it.

    Where messages were completed by calls that no trace sees, nobody knows how long they were waited for.
    """
    grouped: dict[str, list[list[float]]] = defaultdict(list)
    for name, parts in phases(traces):
        ends = [max((event.end for event in part.events if event.end == event.end), default=0.0) for part in parts]
        starts = [min((event.start for event in part.events), default=0.0) for part in parts]
        times = [end - start for start, end in zip(starts, ends, strict=True)]
        spent = {kind: [part.spent(kind) for part in parts] for kind in ("compute", "wait", "agree")}
        messages, nbytes = zip(*(part.received() for part in parts), strict=True)
        # Not zero where nothing was seen: that is not known.
        waits = [math.nan if part.unseen() else wait for part, wait in zip(parts, spent["wait"], strict=True)]
        row = [max(times), _mean(spent["compute"]), _mean(spent["agree"]), _mean(waits), max(waits)]
        grouped[name].append([1e3 * value for value in row] + [sum(messages), sum(nbytes) / 1e6])
    rows = []
    for name, repeats in grouped.items():
        *values, messages, megabytes = np.median(repeats, axis=0)
        share = f"{values[3] / values[0]:.1%}" if values[0] and not math.isnan(values[3]) else ""
        known = ["unknown" if math.isnan(value) else value for value in values]
        rows.append([name or "all", len(repeats), *known, share, int(messages), megabytes])
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
    table = terminal.table(rows, headers, DROP, floatfmt=".2f", stralign="right")
    if unseen := sum(trace.unseen() for trace in traces):
        table += f"\n{unseen} messages were completed by calls that are not traced, such as MPI.Request.Waitall."
    return table


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
