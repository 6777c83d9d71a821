"""One candidate in virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import arrays, virtual
from ..algorithms import ALGORITHMS
from ..machines.machine import Machine
from ..virtual import Cluster, VirtualComm
from .candidates import Candidate
from .task import Task


@dataclass
class Outcome:
    """Cost of a candidate in virtual time; seconds and bytes of the rank with the most.

    Attributes
    ----------
    forward, backward : float
        Seconds of each pass.
    computed : float
        Seconds in the kernel.
    exposed : float
        Seconds that a rank waits for messages, of the rank that waits longest.
    received : int
        Bytes.
    peak : int
        Bytes that a rank holds, its own Q, K, V, output and gradients included.
    """

    candidate: Candidate
    forward: float
    backward: float
    computed: float
    exposed: float
    received: int
    peak: int

    @property
    def seconds(self) -> float:
        """Seconds of both passes."""
        return self.forward + self.backward


def simulate(task: Task, machine: Machine, ranks: int, candidate: Candidate, limit: float = math.inf) -> Outcome:
    """Run the algorithm itself on the virtual cluster, with arrays without data; TimeoutError after `limit` seconds."""
    problem, order = task.problem(ranks), candidate.order(ranks)
    wide = arrays.dtype(task.dtype)

    def program(comm: VirtualComm) -> tuple[float, float, float, float, int, int]:
        rank = comm.me
        ordered = comm.Split(0, order[comm.Get_rank()]) if candidate.inside else comm
        build = ALGORITHMS[candidate.algorithm]
        options: dict[str, Any] = {"mask": task.mask, "layout": problem.layout, "partials": task.partials}
        with build(ordered, **options, **dict(candidate.arguments)) as attention:
            start, waiting = rank.clock, rank.waiting
            q_tokens, kv_tokens = (len(attention.positions(tokens)) for tokens in (problem.q_tokens, problem.kv_tokens))
            q = virtual.empty((task.batch, task.heads, q_tokens, task.head_dim), wide)
            k, v = (
                virtual.empty((task.batch, task.kv_heads, kv_tokens, dim), wide)
                for dim in (problem.head_dim, problem.v_head_dim)
            )
            _, saved = attention.forward(q, k, v)
            middle = rank.clock
            if task.backward:
                d_out = virtual.empty((*q.shape[:3], problem.v_head_dim), wide)
                attention.backward(d_out, saved)
            return middle - start, rank.clock - middle, rank.computed, rank.waiting - waiting, rank.received, rank.peak

    columns = list(zip(*Cluster(ranks, machine, limit).run(program), strict=True))
    return Outcome(candidate, *(max(column) for column in columns))
