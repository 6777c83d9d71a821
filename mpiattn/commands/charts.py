"""Charts of simulated and measured times: one style, colours that colour-blind people can tell apart."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from ..errors import InputError
from ..machines import writing

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Of Okabe and Ito (2008): told apart with any kind of colour vision; markers differ as well."""

MARKERS = ("o", "s", "^", "D", "v", "P")


def figure(width: float = 7.0, height: float = 4.5, columns: int = 1) -> tuple[Figure, list[Axes]]:
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
    ours: Mapping[str, Sequence[float]],
    claimed: Mapping[str, Sequence[float]] | None = None,
    plain: Mapping[str, Sequence[float]] | None = None,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: str = "xy",
    beside: bool = False,
) -> None:
    """Draw a line for each series.

    Parameters
    ----------
    ours : by name
        With a colour and a marker each.
    claimed : by name
        In the colours of ours, in order, dashed and hollow.
    plain : by name
        To compare with: grey lines without markers.
    log : str
        The axes that are logarithmic.
    beside : bool
        Whether the legend has its place beside the panel, for want of room inside.
    """
    for number, (name, values) in enumerate(ours.items()):
        axes.plot(x, values, label=name, color=COLOURS[number], marker=MARKERS[number])
    for number, (name, values) in enumerate((claimed or {}).items()):
        hollow = {"markerfacecolor": "white", "linestyle": "--"}
        axes.plot(x, values, label=name, color=COLOURS[number], marker=MARKERS[number], **hollow)
    for style, (name, values) in zip(("--", ":", "-."), (plain or {}).items(), strict=False):
        axes.plot(x, values, label=name, color="0.4", linewidth=1.2, linestyle=style, zorder=1)
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
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if beside else {"loc": "best"}
    axes.legend(frameon=False, fontsize=9, **place)


def check(path: Path) -> None:
    """Raise InputError, before any work, where no figure can be written there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("figures are drawn with matplotlib: pip install 'mpiattn[plot]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path}: the name must end in .png, .svg or .pdf")
    writing.check(path)


def save(drawing: Figure, path: str | Path) -> None:
    """Write a figure."""
    with writing.replacing(path) as part:
        drawing.savefig(part, dpi=150)
