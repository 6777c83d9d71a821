"""Draw the share of clips judged rightly, with attention over the frames and without, from video.txt."""

from __future__ import annotations

import re
from pathlib import Path

from mpiattn.commands.charts import COLOURS, MARKERS, figure, save

HERE = Path(__file__).parent
LABELS = "attention over the frames", "each frame by itself"


def main() -> None:
    """Draw video.png."""
    drawing, [axes] = figure()
    runs = (HERE / "video.txt").read_text("utf-8").split("$ ")[1:]
    for run, label, colour, marker in zip(runs, LABELS, COLOURS, MARKERS, strict=False):
        steps, shares = zip(*re.findall(r"step +(\d+) .* right +(\d+)%", run), strict=True)
        held_out = re.findall(r"held out right: (.*)", run)[0]
        axes.plot([*map(int, steps)], [*map(int, shares)], color=colour, marker=marker, label=f"{label}: {held_out}")
    axes.axhline(50, color="0.4", linestyle="--", linewidth=1.2, label="chance")
    axes.set(xlabel="step", ylabel="clips judged rightly, %", ylim=(0, 102))
    axes.legend(frameon=False, fontsize=9, title="400 clips held out, after the last step", title_fontsize=9)
    save(drawing, HERE / "video.png")


if __name__ == "__main__":
    main()
