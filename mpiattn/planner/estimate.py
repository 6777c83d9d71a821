"""How long a candidate roughly takes, and what it holds, in closed form: which candidates are worth a run."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from ..costs.peak import peak
from ..machine import Link, Machine, operations
from ..parcel import nbytes
from ..problem import Problem
from .candidates import GATHERED, Candidate
from .task import Task

PASSES = {"mesh_gathered": 4}
"""Passes over arrays for each message, roughly, where it isn't one: what arrives is joined, what leaves is cut."""

EXCHANGE = 8
"""The same for an exchange of heads, which also reorders tokens, a run at a time."""


class Estimate(NamedTuple):
    """Seconds that a candidate roughly takes, to three digits, and of its messages alone; the least comes first."""

    seconds: float
    messages: float


def estimate(task: Task, machine: Machine, ranks: int, candidate: Candidate) -> Estimate:
    """Return roughly how long a candidate takes: the rank's own time or messages, whichever takes longer.

    A rank spends its time in the kernel, to post messages, and to start passes over arrays. Messages take the time
    of their bytes on the links they cross, the slowest rank's; where nothing is computed meanwhile, as in an exchange
    of heads, both times add up. Latency isn't counted, nor how long a pass takes once it has started.
    """
    group, rows, cols = candidate.shape(ranks)
    chunks = _problem(task, rows * cols)
    share, kv_share = 1 / min(group, task.heads), 1 / min(group, task.kv_heads)  # of the heads
    kinds = chunks.q, chunks.kv, chunks.o, chunks.q_backward, chunks.d_q, chunks.d_kv
    q, kv, o, rows_back, d_q, d_kv = (nbytes(parcel(0)) for parcel in kinds)
    along_row, along_col, exchange = q + o, kv, 2 * q + kv
    if task.backward:
        along_row, along_col, exchange = along_row + rows_back + d_q, along_col + kv + d_kv, 2 * exchange
    node = math.gcd(machine.ranks_per_node, ranks)
    near_rows, near_cols = candidate.inside or _in_order(max(node // group, 1), cols)
    row = (cols - 1) * along_row * share * _per_byte(machine, node, near_cols < cols, near_rows * group)
    col = (rows - 1) * along_col * kv_share * _per_byte(machine, node, near_rows < rows, near_cols * group)
    if candidate.algorithm == "double_ring":
        outer = dict(candidate.arguments)["outer"]
        col = (rows - 1) * along_col * _per_byte(machine, node, ranks // outer > node, 1)
        col = max(col, (outer - 1) * along_col * _per_byte(machine, node, ranks > node, node))
    heads = (group - 1) / group**2 * exchange * _per_byte(machine, node, group > node, node)
    work = _work(task, machine, ranks, candidate) + _started(task, machine, ranks, candidate)
    if candidate.algorithm in GATHERED:
        seconds = work + (row + col) / dict(candidate.arguments).get("head_groups", 1)
    else:
        seconds = max(work, row + col) + heads
    return Estimate(float(f"{seconds:.3g}"), row + col + heads)


def _work(task: Task, machine: Machine, ranks: int, candidate: Candidate) -> float:
    """Return the seconds in the kernel of the rank with the most work."""
    group, rows, cols = candidate.shape(ranks)
    chunks, rates = _problem(task, rows * cols), machine.rates(task.dtype)
    heads = task.batch * -(-task.heads // min(group, task.heads))
    pairs = chunks.pairs.reshape(rows, cols, rows, cols).sum((1, 2)).max()
    side = math.sqrt(task.tokens * (task.kv_tokens or task.tokens)) / (rows * cols)
    side *= math.sqrt(rows * cols) if candidate.algorithm == "mesh_gathered" else 1
    return sum(
        heads * float(pairs) * operations(chunks.head_dim, chunks.v_head_dim, backward) / rates.at(side, backward)
        for backward in ((False, True) if task.backward else (False,))
    )


def _started(task: Task, machine: Machine, ranks: int, candidate: Candidate) -> float:
    """Return the seconds to post all messages, and to start the kernel and the passes over arrays."""
    group, rows, cols = candidate.shape(ranks)
    directions = 2 if task.backward else 1
    hops = (cols - 1) * 2 * directions + (rows - 1) * (2 * directions - 1)  # Q and its sums; K/V, and dK/dV backward
    exchanged = (group - 1) * 2 * directions
    passes = hops * PASSES.get(candidate.algorithm, 1) + exchanged * EXCHANGE
    calls = directions * (1 if candidate.algorithm in GATHERED else rows * cols)
    posted = 2 * (hops + exchanged)  # a receive and a send
    return calls * machine.rates(task.dtype).call + posted * machine.overhead + passes * machine.launch


def held(task: Task, ranks: int, candidate: Candidate) -> int:
    """Return the bytes that a rank holds at most, what it is given included: that of the first and the last rank."""
    problem, most = _problem(task, ranks), 0
    for rank in {0, ranks - 1}:
        held = peak(candidate.algorithm, problem, rank, **dict(candidate.arguments))
        given = nbytes(problem.qkv(rank)) + (nbytes(problem.out(rank)[1:]) if task.backward else 0)
        most = max(most, given + max(held.forward, held.backward if task.backward else 0))
    return most


def _in_order(near: int, cols: int) -> tuple[int, int]:
    """Return the rows and columns inside a node of so many groups, where ranks are in the order of the nodes."""
    return max(near // cols, 1), min(near, cols)


def _per_byte(machine: Machine, node: int, leaves: bool, crossing: int) -> float:
    """Return the seconds of a byte between neighbours, of which so many in a node have theirs in another."""
    link: Link = machine.links["network"] if leaves or "node" not in machine.links else machine.links["node"]
    if not leaves:
        return 1 / link.bandwidth
    return max(1 / link.bandwidth, crossing / (link.cards or crossing) / link.bandwidth, crossing / link.shared)


@functools.lru_cache(maxsize=256)
def _problem(task: Task, ranks: int) -> Problem:
    return task.problem(ranks)
