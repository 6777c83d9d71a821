"""One step of a ring, with and without its messages, its compute, and progress in between."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import numpy as np

from ...arrays.softmax import LSE
from ...kernels.contract import Progress
from ...kernels.numpy.kernel import NumpyKernel
from ...messages.message import Communicator, Request, Tag, Testall, Waitall
from ...messages.parcel import Parcel
from ...problems.block import Block
from ...problems.mask import Full

HEADS, HEAD_DIM = 8, 128


class RingStep:
    """One step of a ring, to be measured in several ways."""

    def __init__(self, comm: Communicator, tokens: int) -> None:
        self.comm = comm
        size, rank = comm.Get_size(), comm.Get_rank()
        self.source, self.dest = (rank - 1) % size, (rank + 1) % size
        spec = ((1, HEADS, tokens, HEAD_DIM), np.dtype(np.float32))
        self.near, self.leaving, self.arriving = (Parcel([spec, spec]) for _ in range(3))
        rng = np.random.default_rng(rank)
        for array in self.near.arrays + self.leaving.arrays:
            array[...] = rng.standard_normal(array.shape, np.float32)
        self.arriving.fill(0, 0)
        self.keys = np.arange(tokens)
        self.kernel = NumpyKernel()
        self.ask(1)

    def ask(self, queries: int) -> None:
        """Set the number of queries, and with it the time of compute."""
        self.q = np.random.default_rng(0).standard_normal((1, HEADS, queries, HEAD_DIM), np.float32)
        self.block = Block(Full(), np.arange(queries), self.keys)

    def post(self) -> list[Request]:
        """Post the receive, then the send."""
        arriving = self.comm.Irecv(self.arriving.message, self.source, Tag.KV)
        return [arriving, self.comm.Isend(self.leaving.message, self.dest, Tag.KV)]

    def compute(self, progress: Progress | None = None) -> None:
        """Attend to a block."""
        out, lse = np.zeros_like(self.q), np.full(self.q.shape[:3], -np.inf, LSE)
        k, v = self.near.arrays
        self.kernel.forward(self.q, k, v, block=self.block, out=out, lse=lse, progress=progress)

    def time(self, communicates: bool, computes: bool, pokes: bool) -> tuple[float, float]:
        """Return the seconds of one step, and of its wait, on this rank."""
        self.comm.Barrier()
        start = time.perf_counter()
        requests = self.post() if communicates else []
        if computes:
            self.compute(partial(Testall, requests) if pokes else None)
        middle = time.perf_counter()
        Waitall(requests)
        end = time.perf_counter()
        return end - start, end - middle


def measure(step: RingStep, ratio: float, rounds: int) -> list[dict[str, Any]]:
    """Return a row without and one with progress, for compute that takes `ratio` times communication."""
    comm = step.comm
    ways = {
        "communication": (True, False, False),
        "compute": (False, True, False),
        "none": (True, True, False),
        "testall": (True, True, True),
    }
    communication = _slowest(comm, [step.time(*ways["communication"])[0] for _ in range(9)])
    step.ask(64)
    for _ in range(3):  # time isn't quite proportional to queries
        seconds = _slowest(comm, [step.time(*ways["compute"])[0] for _ in range(5)])
        step.ask(max(round(len(step.block.queries) * ratio * communication / seconds), 1))
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            overall, wait = step.time(*way)
            ranks = np.array(comm.allgather((overall, wait)))
            if number:
                longest, most = map(float, ranks.max(axis=0))
                times[name].append((longest, most, float(ranks[:, 1].mean())))
    medians = {name: [statistics.median(column) for column in zip(*times[name], strict=True)] for name in ways}
    rows = []
    for name in ("none", "testall"):
        overall, wait, mean_wait = medians[name]
        compute, communication = medians["compute"][0], medians["communication"][0]
        rows.append(
            {
                "ratio": ratio,
                "progress": name == "testall",
                "queries": len(step.block.queries),
                "overall": overall,
                "compute": compute,
                "communication": communication,
                "overlap": min(max(1 - (overall - compute) / communication, 0.0), 1.0),
                "wait": wait,
                "mean_wait": mean_wait,
                # Of the same step: what the machine does meanwhile is in both.
                "wait_share": statistics.median(w / o for o, w, _ in times[name]),
                "mean_wait_share": statistics.median(m / o for o, _, m in times[name]),
                "rounds": times[name],
            }
        )
    return rows


def _slowest(comm: Communicator, seconds: list[float]) -> float:
    """Return the median of the slowest rank's times."""
    return float(np.median(np.max(comm.allgather(seconds), axis=0)))
