"""The lab's experiment, measured: standard against ring attention, time and memory, 512 to 8,192 tokens."""

from __future__ import annotations

import argparse
import math
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ...algorithms import ALGORITHMS
from ...arrays import Array
from ...messages.message import Communicator
from ...problems.layout import positions
from .. import charts
from ..progress import bar
from .report import Report

LENGTHS = (512, 1024, 2048, 4096, 8192)
BATCH, MODEL, DIM = 2, 512, 64


def measure(args: argparse.Namespace, comm: Communicator) -> Report | None:
    """Measure on the ranks at hand; return the report on rank 0."""
    size, rank = comm.Get_size(), comm.Get_rank()
    rng = np.random.default_rng(1)
    weights = [(rng.standard_normal((MODEL, DIM)) / np.sqrt(MODEL)).astype(np.float32) for _ in "qkv"]
    progress = bar(comm, total=len(LENGTHS) * args.iterations, unit="round")
    rows: list[tuple[object, ...]] = []
    with ALGORITHMS["ring"](comm, layout="contiguous") as ring:
        for tokens in LENGTHS:
            x = np.random.default_rng(tokens).standard_normal((BATCH, tokens, MODEL), np.float32)
            own = np.ascontiguousarray(x[:, positions("contiguous", tokens, size, rank)])

            def ours(own: Array = own) -> Array:
                q, k, v = (np.ascontiguousarray(own @ weight)[:, None] for weight in weights)
                out: Array = ring.forward(q, k, v)[0]
                return out

            seconds: dict[str, list[float]] = {"standard": [], "ring": []}
            for _ in range(args.iterations):
                progress.set_postfix_str(f"{tokens} tokens", refresh=False)
                comm.Barrier()
                if rank == 0:
                    start = time.perf_counter()
                    standard(x, weights)
                    seconds["standard"].append(time.perf_counter() - start)
                comm.Barrier()
                start = time.perf_counter()
                ours()
                comm.Barrier()
                seconds["ring"].append(time.perf_counter() - start)
                progress.update()
            reference, whole_peak = peak(partial(standard, x, weights)) if rank == 0 else (x, 0)
            part, part_peak = peak(ours)
            held = max(comm.allgather(part_peak))
            parts = comm.allgather(part)
            if rank == 0:
                whole = np.concatenate([part[:, 0] for part in parts], axis=1)
                error = float(np.abs(whole - reference).max() / np.abs(reference).max())
                block = -(-tokens // size)
                rows.append(
                    (tokens, f"{1e3 * np.median(seconds['standard']):.1f}", f"{1e3 * np.median(seconds['ring']):.1f}",
                     f"{BATCH * tokens**2 * 4 / 2**20:.1f}", f"{whole_peak / 2**20:.1f}",
                     f"{BATCH * block**2 * 4 / 2**20:.2f}", f"{held / 2**20:.2f}", f"{error:.0e}")
                )  # fmt: skip
    progress.close()
    return None if rank else written(args, size, rows)


T = TypeVar("T")


def standard(x: Array, weights: Sequence[Array]) -> Any:
    """Return the lab's standard attention."""
    q, k, v = (x @ weight for weight in weights)
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(DIM)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True) @ v


def peak(work: Callable[[], T]) -> tuple[T, int]:
    """Return what a function returns, and the most bytes that it had allocated."""
    tracemalloc.start()
    result = work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, most


def written(args: argparse.Namespace, size: int, rows: list[tuple[object, ...]]) -> Report:
    """Return the report on what was measured."""
    report = Report(args.output, "lab", "Standard against ring attention (lab, performance test)", args.called)
    report.note(
        f"Measured: batch {BATCH}, d_model {MODEL}, d_k = d_v = {DIM}, float32, forward with projections; the standard "
        f"form on one rank, the ring on {size} MPI ranks of one host with {os.cpu_count()} cores; median of "
        f"{args.iterations}. Peak: bytes allocated by NumPy in the call, traced."
    )
    headers = ("tokens", "standard (ms)", f"ring, {size} ranks (ms)", "standard: lab's formula (MiB)",
               "standard: peak (MiB)", "ring: lab's formula (MiB)", "ring: peak a rank (MiB)",
               "difference")  # fmt: skip
    report.table(rows, headers)
    report.note(
        "Why it differs: the lab does not measure memory but prints batch n² 4 bytes, and for its ring batch (n/N)² 4: "
        "the scores of one block. The standard form holds them three times (before, in, after the softmax). A block's "
        "scores need not exist at all: the kernel works in tiles, so the ring's real memory grows with n/N, and what "
        "it holds are Q, the output and two buffers of K/V, which the lab leaves out. The lab's ring is slower "
        "than the standard form, as it computes the same blocks again each round on one device; on several cores it is "
        "faster."
    )
    left, right = report.figure(2, width=11)
    values = [[float(str(value)) for value in column] for column in zip(*rows, strict=True)]
    charts.lines(left, LENGTHS, {"standard": values[1], f"ring, {size} ranks": values[2]},
                 xlabel="sequence length (tokens)", ylabel="time (ms)", title="time of a forward pass")  # fmt: skip
    charts.lines(right, LENGTHS, {"standard, peak": values[4], "ring, peak a rank": values[6]},
                 {"standard, lab's formula": values[3], "ring, lab's formula": values[5]},
                 xlabel="sequence length (tokens)", ylabel="memory (MiB)", title="memory")  # fmt: skip
    return report
