"""Pictures of traces, in colours that colour-blind readers can tell apart (Okabe and Ito 2008)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...messages.message import Tag
from ...trace import owners
from ...trace.events import Event, Trace
from .. import charts
from .report import flows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPUTE, WAIT, AGREE = "#9ecbe8", "#E69F00", "#bbbbbb"
MESSAGES = {
    Tag.Q.name: "#0072B2",
    Tag.KV.name: "#D55E00",
    Tag.O.name: "#009E73",
    Tag.D_Q.name: "#5b2a86",
    Tag.D_KV.name: "#CC79A7",
}
OTHER = "black"
WIDTH = 13.0  # inches
MOST_ARROWS = 400  # beyond them lines without heads
MOST_NAMES = 100  # beyond them arrows without names
SHORT = {Tag.D_Q.name: "dQ", Tag.D_KV.name: "dKV"}
HALF = 0.32  # of the height of a rank's bar


def draw_trace(traces: Sequence[Sequence[Trace]], path: str | Path, titles: Sequence[str]) -> None:
    """Draw timelines of all ranks, one below the other: blocks of compute, waits, and an arrow for each message.

    Parameters
    ----------
    traces : sequence of sequences of Trace
        For each timeline those of all ranks, on one clock.
    path : path
        The suffix says the format: png, svg, pdf.
    titles : sequence of str
    """
    from matplotlib.figure import Figure

    height = 1.6 + max(0.75, 4.5 / len(traces[0])) * len(traces[0])
    figure = Figure(figsize=(WIDTH, min(height * len(traces), 14.0)), layout="constrained")
    for axes, one, title in zip(figure.subplots(len(traces), squeeze=False)[:, 0], traces, titles, strict=True):
        draw_timeline(axes, one, title)
    charts.save(figure, path)


def draw_timeline(axes: Axes, traces: Sequence[Trace], title: str = "") -> None:
    """Draw one timeline into a picture."""
    events = [event for trace in traces for event in trace.events if event.end == event.end]
    start = min((event.start for event in events), default=0.0)
    end = max((event.end for event in events), default=1.0)
    scale, unit = (1e3, "ms") if end - start < 10 else (1.0, "s")

    def x(time: float) -> float:
        return (time - start) * scale

    styles: dict[str, dict[str, Any]] = {
        "compute": {"facecolor": COMPUTE, "edgecolor": "white", "linewidth": 0.5},
        "wait": {"facecolor": "white", "edgecolor": WAIT, "hatch": "////", "linewidth": 0.0},
        "agree": {"facecolor": AGREE, "linewidth": 0.0},
    }
    named = any(event.owners for event in events)
    block = "whose queries Q and keys KV" if named else "first query, first key"
    labels = {"compute": f"compute: {block}", "wait": "waiting", "agree": "agreeing on the input"}
    for kind, style in styles.items():
        label = labels[kind]
        for rank, trace in enumerate(traces):
            bars = [(x(e.start), (e.end - e.start) * scale) for e in trace.events if e.kind == kind and e.end == e.end]
            if bars:
                axes.broken_barh(bars, (rank - HALF, 2 * HALF), label=label, **style)
                label = "_"
    _messages(axes, traces, x, 0.006 * x(end))
    _labels(axes, traces, x, end - start)
    _phases(axes, traces[0], x)
    axes.set(xlim=(0, x(end)), ylim=(len(traces) - 0.4, -0.6), xlabel=f"time ({unit})", title=title)
    axes.set(yticks=range(len(traces)), yticklabels=[f"rank {rank}" for rank in range(len(traces))])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _messages(axes: Axes, traces: Sequence[Trace], x: Callable[[float], float], beside_by: float) -> None:
    """An arrow from the call that posted a send to the call that found its receive complete, named by its owner."""
    arrows = [flow for flow in flows(traces) if flow[3].end == flow[3].end]  # seen to arrive
    named = owners.of_messages(traces, arrows)
    drawn: set[tuple[float, int, int]] = set()
    for source, sent, dest, arrived in arrows:
        down = 1 if dest > source else -1
        tail, tip = (x(sent.start), source + down * HALF), (x(arrived.end), dest - down * HALF)
        # Two that go together, K/V and dK/dV in a ring, would hide each other.
        beside = (arrived.end, source, dest) in drawn
        drawn.add((arrived.end, source, dest))
        if beside:
            tail, tip = ((at + beside_by, rank) for at, rank in (tail, tip))
        colour = MESSAGES.get(sent.name, OTHER)
        style = "-|>" if len(arrows) <= MOST_ARROWS else "-"
        line = {"arrowstyle": style, "color": colour, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
        axes.annotate("", tip, tail, arrowprops=line)
        if id(sent) in named and len(arrows) <= MOST_NAMES:
            # Two thirds of the way: nearer to the middle the names of a ring's arrows would meet.
            at, rank = (start + (end - start) * 2 / 3 for start, end in zip(tail, tip, strict=True))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
            name = f"{SHORT.get(sent.name, sent.name)}{named[id(sent)]}"
            axes.text(at, rank, name, color=colour, fontsize=8, weight="bold", ha="center", va="center", bbox=box)
    for name in dict.fromkeys(sent.name for _, sent, _, _ in arrows):
        axes.plot([], [], color=MESSAGES.get(name, OTHER), label=f"message {name}")


def _labels(axes: Axes, traces: Sequence[Trace], x: Callable[[float], float], duration: float) -> None:
    """Name the blocks, where there is room: the owners of queries and keys, or the first position of both."""
    for rank, trace in enumerate(traces):
        for event in trace.events:
            if event.block and event.end - event.start > 0.05 * duration:
                text = "Q{}\nKV{}".format(*event.owners) if event.owners else "q {}\nkv {}".format(*event.block)
                axes.text(x((event.start + event.end) / 2), rank, text, ha="center", va="center", fontsize=8)


def _phases(axes: Axes, trace: Trace, x: Callable[[float], float]) -> None:
    """Mark where rank 0's phases begin, and name them if there are several."""
    spans: list[Event] = [event for event in trace.events if event.kind == "phase"]
    for number, span in enumerate(spans):
        axes.axvline(x(span.start), color="0.5", linewidth=0.8, linestyle=":")
        if len(spans) > 1:
            above: dict[str, Any] = {
                "xytext": (2, 4 + 11 * (number % 2)),
                "textcoords": "offset points",
                "annotation_clip": False,
            }
            axes.annotate(span.name, (x(span.start), -0.5), fontsize=8, va="bottom", **above)
