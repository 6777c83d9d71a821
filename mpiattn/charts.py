"""Charts of simulated and measured times: one style, colours that colour-blind people can tell apart."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .message import InputError

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


def check(path: Path) -> None:
    """Raise InputError, before any work, where no figure can be written there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("figures are drawn with matplotlib: pip install 'mpiattn[plot]'")
    if path.suffix not in ("", ".png", ".svg", ".pdf"):
        raise InputError(f"{path}: the name must end in .png, .svg or .pdf, or have no suffix, for the first two")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")


def save(drawing: Any, path: Path) -> None:
    """Write a figure; without a suffix, as both PNG and SVG."""
    from matplotlib import rc_context

    if path.suffix:
        drawing.savefig(path, dpi=150)
    else:
        drawing.savefig(path.with_suffix(".png"), dpi=150)
        with rc_context({"svg.hashsalt": "mpiattn"}):  # the same picture is the same file
            drawing.savefig(path.with_suffix(".svg"), metadata={"Date": None})
