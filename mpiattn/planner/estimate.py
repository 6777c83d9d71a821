"""Rough time and memory of a candidate in closed form, which say which candidates are worth a run."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from ..costs import double_ring
from ..costs.peak import peak
from ..machines.machine import Machine, operations
from ..messages.parcel import nbytes
from ..problems.problem import Problem
from ..problems.travel import travels
from .candidates import GATHERED, Candidate, per_node
from .task import Task

PASSES = {"mesh_gathered": 4}
"""Passes over arrays for each message, roughly, where it isn't one: what arrives is joined, what leaves is cut."""

EXCHANGE = 8
"""The same for an exchange of heads, which also reorders tokens, a run at a time."""


class Hops(NamedTuple):
    """Numbers of messages of a kind that a rank receives one after another, in each pass: along its row, its column."""

    row: int
    col: int


class Estimate(NamedTuple):
    """Seconds that a candidate roughly takes, to three digits, of its messages alone, and in the kernel alone."""

    seconds: float
    messages: float
    work: float


def estimate(task: Task, machine: Machine, ranks: int, candidate: Candidate) -> Estimate:
    """Return roughly how long a candidate takes: the rank's own time or messages, whichever takes longer.

    A rank spends its time in the kernel, to post messages, and to start passes over arrays. Messages take the latency
    and the time of their bytes on the links they cross, the slowest rank's. In each step the longer of both counts:
    a mask may leave some steps with much to compute and others with nothing. Where nothing is computed meanwhile, as
    in an exchange of heads, both times add up. How long a pass takes once it has started isn't counted.
    """
    group, rows, cols = candidate.shape(ranks)
    chunks = _problem(task, rows * cols)
    share, kv_share = 1 / min(group, task.heads), 1 / min(group, task.kv_heads)  # of the heads
    kinds = chunks.q, chunks.kv, chunks.o, chunks.q_backward, chunks.d_q, chunks.d_kv
    q, kv, o, rows_back, d_q, d_kv = (nbytes(parcel(0)) for parcel in kinds)
    along_row, along_col, exchange = q + o, kv, 2 * q * share + kv * kv_share
    if task.backward:
        along_row, along_col = along_row + rows_back + d_q, along_col + kv + d_kv
        exchange += 2 * q * share + (d_kv if group > task.kv_heads else kv) * kv_share
    node = per_node(machine, ranks)
    near_rows, near_cols = candidate.inside or _in_order(max(node // group, 1), cols)
    hops, latencies = _hops(chunks, candidate, rows, cols), 2 if task.backward else 1
    gathered = candidate.algorithm in GATHERED

    def seconds(hops: int, nbytes: float, leaves: bool, crossing: int) -> float:
        link = machine.links["network" if leaves or "node" not in machine.links else "node"]
        rounds = hops.bit_length() if gathered else hops
        return rounds * latencies * link.latency + hops * nbytes * link.per_byte(crossing if leaves else 1)

    row = seconds(hops.row, along_row * share, near_cols < cols, min(near_rows * group, node))
    col = seconds(hops.col, along_col * kv_share, near_rows < rows, min(near_cols * group, node))
    if candidate.algorithm == "double_ring":
        outer = dict(candidate.arguments)["outer"]
        col = seconds(hops.col, along_col, ranks // outer > node, 1)
        col = max(col, seconds(min(outer - 1, hops.col), along_col, ranks > node, min(ranks // outer, node)))
    heads = seconds(group - 1, exchange / group, group > node, node)
    blocks = _blocks(task, machine, ranks, candidate)
    started, messages = _started(task, machine, ranks, candidate, hops), row + col
    if gathered:
        total = sum(blocks) + started + messages / dict(candidate.arguments).get("head_groups", 1)
    else:
        total = _overlapped(blocks, messages, sum(hops)) + started + heads
    return Estimate(float(f"{total:.3g}"), messages + heads, sum(blocks))


def _overlapped(blocks: list[float], messages: float, hops: int) -> float:
    """Return the seconds of as many steps as there are hops, and of what is computed when all has arrived."""
    steps = [float(step.sum()) for step in np.array_split(np.trim_zeros(np.array(blocks), "b"), hops + 1)]
    return sum(max(step, messages / hops) for step in steps[:hops]) + steps[hops]


def _hops(chunks: Problem, candidate: Candidate, rows: int, cols: int) -> Hops:
    """Return how far chunks travel along a row and along a column, those that the mask sends furthest."""
    if candidate.algorithm in GATHERED:
        return Hops(cols - 1, rows - 1)
    if candidate.algorithm == "double_ring":
        outer, some = dict(candidate.arguments)["outer"], {0, rows // 2, rows - 1}
        return Hops(0, max(double_ring.costs(chunks, rank, outer).forward.messages for rank in some))
    tiles = chunks.needed.reshape(rows, cols, rows, cols)
    in_rows = [travels(tiles[r].any(axis=1)) for r in range(rows)]
    in_cols = [travels(tiles[:, :, :, c].any(axis=1).T) for c in range(cols)]
    return Hops(*(max(way.last for line in lines for way in line) for lines in (in_rows, in_cols)))


def _blocks(task: Task, machine: Machine, ranks: int, candidate: Candidate) -> list[float]:
    """Return the seconds in the kernel of each block of the rank with the most work, its own block first."""
    group, rows, cols = candidate.shape(ranks)
    chunks, rates = _problem(task, rows * cols), machine.rates(task.dtype)
    heads = task.batch * -(-task.heads // min(group, task.heads))
    tiles = chunks.pairs.reshape(rows, cols, rows, cols)
    r, c = divmod(int(tiles.sum(axis=(1, 2)).argmax()), cols)
    steps = sorted((down + along, down, along) for down in range(rows) for along in range(cols))
    pairs = [tiles[r, (c - along) % cols, (r - down) % rows, c] for _, down, along in steps]
    side = math.sqrt(task.tokens * (task.kv_tokens or task.tokens)) / (rows * cols)
    side *= math.sqrt(rows * cols) if candidate.algorithm == "mesh_gathered" else 1
    rate = sum(
        heads * operations(chunks.head_dim, chunks.v_head_dim, backward) / rates.at(side, backward)
        for backward in ((False, True) if task.backward else (False,))
    )
    return [rate * float(block) for block in pairs]


def _started(task: Task, machine: Machine, ranks: int, candidate: Candidate, hops: Hops) -> float:
    """Return the seconds to post all messages, and to start the kernel and the passes over arrays."""
    group, rows, cols = candidate.shape(ranks)
    directions = 2 if task.backward else 1
    messages = hops.row * 2 * directions + hops.col * (2 * directions - 1)  # Q and its sums; K/V, and dK/dV backward
    exchanged = (group - 1) * 2 * directions
    needed = _problem(task, rows * cols).needed.reshape(rows, cols, rows, cols)
    calls = directions * int(needed.sum(axis=(1, 2)).max())
    if candidate.algorithm == "mesh_gathered":
        calls = directions
    if candidate.algorithm == "allgather":  # of K/V by the MPI library
        groups = min(dict(candidate.arguments).get("head_groups", 1), task.kv_heads)
        messages, calls = groups * (directions - 1) * hops.col, groups * calls
    passes = messages * PASSES.get(candidate.algorithm, 1) + exchanged * EXCHANGE
    posted = 2 * (messages + exchanged)  # a receive and a send
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


@functools.lru_cache(maxsize=256)
def _problem(task: Task, ranks: int) -> Problem:
    return task.problem(ranks)
