"""The tile of a rank in Mesh-Attention under a mask: the steps in which its blocks are computed, and which are left."""

from __future__ import annotations

from collections.abc import Sequence

from ..problems.mask import Positions
from ..problems.problem import Problem
from .search import backward, forward
from .steps import Step, relative

Block = tuple[int, int, slice, Positions]
"""KV slot and Q slot of a block, which of the queries, and their positions."""


def steps(problem: Problem, rows: int, cols: int) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Return the steps forward and backward, on a grid where all messages take as long as all blocks."""
    sizes = {
        "heads": problem.heads, "kv_heads": problem.kv_heads, "head_dim": problem.head_dim,
        "itemsize": problem.dtype.itemsize, "partial_itemsize": problem.sent(problem.d_q(0))[0][1].itemsize,
    }  # fmt: skip
    there = relative(**sizes).balanced(rows, cols)
    back = relative(backward=True, **sizes).balanced(rows, cols)
    return forward(rows, cols, there), backward(rows, cols, back)


def blocks(
    problem: Problem, order: Sequence[Step], q_owners: Sequence[int], kv_owners: Sequence[int]
) -> list[list[Block]]:
    """Return the blocks of each step that the mask leaves something of.

    Where the first or the last message has none to hide behind, the own block is shared out to both.

    Parameters
    ----------
    problem : Problem
    order : the steps
    q_owners, kv_owners : of the chunk in each slot; slot 0 is the rank's own
    """
    own = q_owners[0]
    table = []
    for step in order:
        needed = [(i, j) for i, j in step.blocks if problem.needed[q_owners[j], kv_owners[i]]]
        table.append([(i, j, slice(None), problem.q_positions[q_owners[j]]) for i, j in needed])
    if problem.needed[own, own] and len(order) > 1 and not (table[0] and table[-1]):
        table = [[block for block in some if block[:2] != (0, 0)] for some in table]
        for some, (part, positions) in zip((table[0], table[-1]), problem.halves(own), strict=True):
            some += [(0, 0, part, positions)] if len(positions) else []
    return table
