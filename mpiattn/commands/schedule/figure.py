"""The picture of a schedule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from ...schedule.steps import HopTimes, Op, Step, makespan
from ..charts import COLOURS, save

COLOUR = dict(zip((Op.Q, Op.KV, Op.O, Op.DKV, Op.DQ), COLOURS, strict=False))


def draw(steps: Sequence[Step], costs: HopTimes, path: str | Path, title: str = "") -> None:
    """Picture: messages above blocks on one axis of time, and below the tile with the step of each block."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, cols = (1 + max(block[axis] for step in steps for block in step.blocks) for axis in (0, 1))
    height, small = 5 * min(1, max(rows / 8, 0.4)), len(steps) <= 40
    figure = Figure(figsize=(11, 4 + height), layout="constrained")
    timeline, tile = figure.subplots(2, 1, height_ratios=[3, 0.5 + height])
    total, now = makespan(steps, costs) or 1.0, 0.0
    for number, step in enumerate(steps, 1):
        shade, ink = colormaps["cividis"](now / total), "white" if now < 0.6 * total else "black"
        travel, width = costs.of(step.message), makespan([step], costs)
        if step.message:
            timeline.broken_barh([(now, travel)], (1, 0.8), color=COLOUR[step.message], edgecolor="white")
            if travel > 0.03 * total:
                label = {"s": f"{step.message.value}\n{step.hop}", "ha": "center", "va": "center", "fontsize": 9}
                timeline.text(now + travel / 2, 1.4, **label, color="white" if step.message is Op.Q else "black")
        bars = [(now + k * costs.block, costs.block) for k in range(len(step.blocks))]
        timeline.broken_barh(bars, (0, 0.8), color=shade, edgecolor="white", linewidth=0.8 if small else 0.1)
        if small:
            timeline.text(now + width / 2, 1.95, str(number), ha="center", fontsize=8)
            timeline.axvline(now + width, color="0.8", linewidth=0.5, zorder=0)
        for i, j in step.blocks:
            tile.broken_barh([(j - 0.5, 1)], (i - 0.5, 1), color=shade, edgecolor="white")
            if max(rows, cols) <= 16:
                tile.text(j, i, str(number), ha="center", va="center", color=ink, fontsize=9)
        now += width
    for op in dict.fromkeys(step.message for step in steps if step.message):
        timeline.plot([], [], color=COLOUR[op], linewidth=6, label=op.value)
    if any(step.message for step in steps):
        timeline.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="message")
    timeline.set(xlim=(0, total), ylim=(-0.1, 2.2), yticks=[0.4, 1.4], yticklabels=["blocks", "message"])
    timeline.set(xlabel="time" + ", and the step on top" * small, title=title)
    tile.set(xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal")
    tile.set(xticks=range(0, cols, 1 + cols // 17), yticks=range(0, rows, 1 + rows // 17))
    tile.set(xlabel="Q slot", ylabel="KV slot")
    tile.set_title("when each block is computed: dark first" + ", and its step" * (max(rows, cols) <= 16))
    for axes, side in itertools.product((timeline, tile), ("top", "right", "left")):
        axes.spines[side].set_visible(False)
    save(figure, path)
