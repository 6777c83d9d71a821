"""Draw the speed-ups over the ring that measure.py measured, beside those that the bytes promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

HERE = Path(__file__).parent
HOSTS = (4, 9, 16)
KINDS = {"mha": "as many K/V heads as query heads", "gqa": "4 query heads to a K/V head"}
COLOURS = {"mesh": "#0072B2", "ulysses": "#E69F00", "allgather": "#CC79A7", "ring": "#555555"}
MARKERS = {"mesh": "o", "ulysses": "s", "allgather": "^", "ring": "D"}
NAMES = {"mesh": "Mesh, grid with the fewest bytes", "ulysses": "Ulysses", "allgather": "all-gather", "ring": "Ring"}


def result(document: dict[str, Any], name: str, direction: str) -> dict[str, Any]:
    """Return what was measured of an algorithm; the mesh's on the grid with the fewest bytes."""
    found = [one[direction] for key, one in document["results"].items() if key.split()[0] == name]
    return min(found, key=lambda one: int(one["bytes"]))


def main() -> None:
    """Draw speedup.png."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    rates = set()
    for row, (kind, what) in zip(panels, KINDS.items(), strict=True):
        documents = [json.loads((HERE / f"{hosts}-{kind}.json").read_text()) for hosts in HOSTS]
        rates |= {document["rate"].replace("mbit", " Mbit/s") for document in documents}
        for axes, direction in zip(row, ("forward", "backward"), strict=True):
            for shift, name in zip((1, 0.97, 1.03, 1), NAMES, strict=True):  # markers side by side
                cases = [result(document, name, direction) for document in documents]
                rings = [result(document, "ring", direction) for document in documents]
                by_bytes = [case["speedup_by_bytes"] for case in cases]
                axes.plot(HOSTS, by_bytes, color=COLOURS[name], linewidth=1.5, linestyle="-" if name != "ring" else ":")
                if name == "ring":
                    continue
                rounds = [
                    [r / s for r, s in zip(ring["seconds"], case["seconds"], strict=True)]
                    for ring, case in zip(rings, cases, strict=True)
                ]
                middle = np.array([np.median(ratios) for ratios in rounds])
                spread = np.abs([[min(ratios), max(ratios)] for ratios in rounds] - middle[:, None]).T
                style = {"fmt": MARKERS[name], "color": COLOURS[name], "markersize": 7, "capsize": 3, "linewidth": 1}
                axes.errorbar(np.array(HOSTS) * shift, middle, spread, **style)
            axes.set_title(f"{direction}, {what}", fontsize=11)
            axes.set(xscale="log", yscale="log", xlim=(3.5, 18.5), xticks=HOSTS, xticklabels=[str(h) for h in HOSTS])
            axes.minorticks_off()
            ticks = (0.5, 1, 2, 4, 8, 16)
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.grid(axis="y", color="0.9")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    for axes in panels[1]:
        axes.set_xlabel("hosts")
    for axes in panels[:, 0]:
        axes.set_ylabel("speed-up over the ring")
    handles = [
        Line2D([], [], color=COLOURS[name], marker=None if name == "ring" else MARKERS[name], label=text)
        for name, text in NAMES.items()
    ]
    handles[-1].set_linestyle(":")
    handles.append(Line2D([], [], color="black", label="lines: ratio of the bytes that a rank receives"))
    measured = "marks: measured, median and range of the rounds"
    handles.append(Line2D([], [], color="black", marker="o", linestyle="", label=measured))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Hosts with links of {', '.join(sorted(rates))} each way: messages take most of the time")
    figure.savefig(HERE / "speedup.png", dpi=130)


main()
