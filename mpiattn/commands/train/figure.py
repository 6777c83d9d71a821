"""The curve of losses of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..charts import COLOURS, figure, save


def draw(losses: dict[str, Any], path: Path) -> None:
    """Draw the loss of each step and of the text held out, beside the entropy of single bytes."""
    drawing, [axes] = figure()
    axes.plot(range(1, len(losses["train"]) + 1), losses["train"], color=COLOURS[4], linewidth=1, label="a step's loss")
    points = [point for point in losses["validation"] if point[1] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o", label="text held out")
    axes.axhline(losses["unigram"], color="0.4", linestyle="--", linewidth=1.2, label="entropy of single bytes")
    axes.set(xlabel="step", ylabel="nats a byte", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    save(drawing, path)
