"""The tile of a rank in Mesh-Attention under a mask: the steps in which its blocks are computed, and which are left."""

from __future__ import annotations

from collections.abc import Sequence

from ..problems.block import Block
from ..problems.problem import Problem
from .search import backward, forward
from .steps import Step, relative

Tasks = list[tuple[int, int, Block]]
"""Blocks of a step, each with its KV slot and its Q slot."""


def steps(problem: Problem, rows: int, cols: int) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Return the steps forward and backward, on a grid where all messages take as long as all blocks."""
    sizes = {
        "heads": problem.heads, "kv_heads": problem.kv_heads, "head_dim": problem.head_dim,
        "itemsize": problem.dtype.itemsize, "partial_itemsize": problem.sent(problem.d_q(0))[0][1].itemsize,
    }  # fmt: skip
    there = relative(**sizes).balanced(rows, cols)
    back = relative(backward=True, **sizes).balanced(rows, cols)
    return forward(rows, cols, there), backward(rows, cols, back)


def blocks(problem: Problem, order: Sequence[Step], q_owners: Sequence[int], kv_owners: Sequence[int]) -> list[Tasks]:
    """Return the blocks of each step that the mask leaves something of.

    Where the first or the last message has none to hide behind, the rank's own block is cut in two for both.

    Parameters
    ----------
    problem : Problem
    order : the steps
    q_owners, kv_owners : of the chunk in each slot; slot 0 is the rank's own
    """
    own = q_owners[0]
    table: list[Tasks] = []
    for step in order:
        blocks = [(i, j, problem.block(q_owners[j], kv_owners[i])) for i, j in step.blocks]
        table.append([(i, j, block) for i, j, block in blocks if block])
    if problem.needed[own, own] and len(order) > 1 and not (table[0] and table[-1]):
        table = [[task for task in tasks if task[:2] != (0, 0)] for tasks in table]
        for tasks, rows in zip((table[0], table[-1]), problem.halves(own), strict=True):
            block = problem.block(own, own, rows)
            tasks += [(0, 0, block)] if block else []
    return table
