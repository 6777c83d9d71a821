"""Picture of a cache that is spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...problems.mask import Positions
from ..charts import COLOURS, figure, save

HEIGHT = 0.7  # of a rank's bar


def draw(held: Sequence[Positions], prompt: int, token_bytes: float, path: Path) -> None:
    """Draw a row for each rank, with a bar where it holds the keys and values of consecutive tokens.

    Parameters
    ----------
    held : for each rank, the positions of its tokens
    prompt : int
        Tokens of the prompt; those after it are drawn in another colour.
    token_bytes : float
        Bytes of a token's keys and values in all blocks.
    path : Path
    """
    drawing, [axes] = figure(9.0, 1.6 + 0.42 * len(held))
    for rank, positions in enumerate(held):
        runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        cut = [piece for run in runs for piece in (run[run < prompt], run[run >= prompt]) if len(piece)]
        for piece in cut:
            colour = COLOURS[0] if piece[0] < prompt else COLOURS[1]
            axes.broken_barh([(piece[0], len(piece))], (rank - HEIGHT / 2, HEIGHT), facecolor=colour, linewidth=0)
    total = sum(map(len, held))
    labels = [f"rank {rank}: {len(own)} tokens, {len(own) * token_bytes / 1e6:.2f} MB" for rank, own in enumerate(held)]
    axes.set_yticks(range(len(held)), labels)
    axes.invert_yaxis()
    axes.set(xlim=(0, total), xlabel="token of the sequence", title="Who holds which keys and values")
    for colour, name in ((COLOURS[0], "prompt"), (COLOURS[1], "new tokens, in turn")):
        axes.bar([0], [0], color=colour, label=name)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(drawing, path)
