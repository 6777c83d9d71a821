"""Charts of simulated and measured times: one style, colours that colour-blind people can tell apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Of Okabe and Ito (2008): told apart with any kind of colour vision; markers differ as well."""

MARKERS = ("o", "s", "^", "D", "v", "P")


def figure(width: float = 7.0, height: float = 4.5, columns: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, side by side."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(width, height), layout="constrained")
    axes = result.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.3)
    return result, list(axes)


def lines(
    axes: Any,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    claimed: Sequence[str] = (),
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: str = "xy",
) -> None:
    """Draw one line for each series; those that are claimed and not ours are dashed and hollow."""
    for number, (name, values) in enumerate(series.items()):
        hollow = name in claimed
        axes.plot(
            x,
            values,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="--" if hollow else "-",
            markerfacecolor="white" if hollow else None,
        )
    if "x" in log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
    if "y" in log:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend(frameon=False, fontsize=9)


def save(drawing: Any, path: Path) -> None:
    """Write a figure; without a suffix, as both PNG and SVG."""
    from matplotlib import rc_context

    if path.suffix:
        drawing.savefig(path, dpi=150)
    else:
        drawing.savefig(path.with_suffix(".png"), dpi=150)
        with rc_context({"svg.hashsalt": "mpiattn"}):  # the same picture is the same file
            drawing.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def tile_curve(task: Any, machine: Any, ranks: int, path: Path) -> list[dict[str, Any]]:
    """Draw compute, communication and total time of every mesh grid: the best tile is where the first two meet."""
    from .grid import grids
    from .planner import Candidate, simulate, tile

    instant = {
        name: dataclasses.replace(rates, forward=(1e30,), backward=(1e30,), tokens=(1,), call=0.0)
        for name, rates in machine.compute.items()
    }
    silent = dataclasses.replace(machine, compute=instant)
    rows = []
    for b, a in reversed(grids(ranks)):
        candidate = Candidate("mesh", (("rows", b), ("cols", a)))
        outcome, alone = simulate(task, machine, ranks, candidate), simulate(task, silent, ranks, candidate)
        q, kv = tile(task, ranks, candidate)
        rows.append(
            {"rows": b, "cols": a, "queries": q, "keys": kv, "total": outcome.seconds, "compute": outcome.computed,
             "communication": alone.seconds, "exposed": outcome.exposed}
        )  # fmt: skip
    drawing, [axes] = figure(8.5, 5)
    labels = {
        "total": "total",
        "compute": "compute",
        "communication": "communication alone",
        "exposed": "communication not hidden",
    }
    series = {text: [1e3 * row[key] for row in rows] for key, text in labels.items()}
    title = f"{task.tokens} tokens on {ranks} ranks of {machine.name}: the tile's shape"
    lines(axes, [row["cols"] for row in rows], series, xlabel="", ylabel="time (ms)", title=title)
    axes.set_xticks(
        [row["cols"] for row in rows],
        [f"{row['rows']}x{row['cols']}\n{_short(row['queries'])} x\n{_short(row['keys'])}" for row in rows],
        fontsize=8,
    )
    axes.set_xlabel("grid, rows x columns; below, the tile: queries x keys (tokens)")
    best = min(rows, key=lambda row: row["total"])
    axes.axvline(best["cols"], color="0.5", linewidth=1, zorder=0)
    save(drawing, path)
    return rows


def _short(tokens: float) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"
