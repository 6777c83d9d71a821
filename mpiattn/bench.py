"""Benchmarks: how fast the parts of mpiattn are, measured side by side on this machine."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tabulate import tabulate
from threadpoolctl import threadpool_limits

from . import bench_attention, bench_error, bench_overlap, env
from .compare import patiently
from .kernels.numpy import NumpyKernel, plan
from .mask import Causal, Full, Mask
from .message import Communicator, InputError
from .progress import bar
from .softmax import Array, accumulator, delta

Timed = dict[str, Callable[[], object]]

MASKS: dict[str, Mask] = {"full": Full(), "causal": Causal()}
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

TARGETS = {"forward": {"products": 0.80, "torch": 0.85}, "backward": {"products": 0.80, "torch": 0.80}}
"""The least speed wanted of the kernel, as a fraction of what it is compared with."""

KERNEL = """\
Measure the NumPy kernel on one thread: forward and backward of one rank's block.

Each is compared, in rounds in which all take turns, with
  products  its matrix products alone, of the same tiles: two forward, five backward. What is left to the
            kernel is the softmax in between; 1.00 would mean that it costs nothing.
  textbook  softmax(q k^T) v with all scores of a head in memory (forward only)
  torch     torch.nn.functional.scaled_dot_product_attention, where torch is installed
Times are CPU time of this one thread, so that what else runs on the machine disturbs them least. A fraction
is the other's time over the kernel's, median over the rounds; over 1 the kernel is the faster one.
"""

KERNEL_EPILOG = """\
examples:
  mpiattn bench kernel                                       six shapes, some minutes
  mpiattn bench kernel --tokens 2048 --head-dims 64 --rounds 9
  mpiattn bench kernel --mask causal --json causal.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    kernel = benchmarks.add_parser(
        "kernel",
        help="the NumPy kernel against its own matrix products, a textbook version and torch",
        description=KERNEL,
        epilog=KERNEL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernel.add_argument("--head-dims", type=numbers, default=[64, 128], metavar="D,...", help="default 64,128")
    kernel.add_argument(
        "--tokens", type=numbers, default=[2048, 4096, 8192], metavar="T,...", help="default 2048,4096,8192"
    )
    kernel.add_argument("--heads", type=int, default=8, metavar="N", help="default 8")
    kernel.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5, after one that is not timed")
    kernel.add_argument("--mask", choices=MASKS, default="full", help="default full")
    kernel.add_argument("--dtype", choices=DTYPES, default="float32", help="of the inputs (default float32)")
    kernel.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the environment")
    overlap = benchmarks.add_parser(
        "overlap",
        help="how much of a message hides behind compute",
        description=bench_overlap.DESCRIPTION,
        epilog="example:\n  mpiexec -n 2 mpiattn bench overlap",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_overlap.add_arguments(overlap)
    error = benchmarks.add_parser(
        "error",
        help="whether results are as exact on many ranks as on one",
        description=bench_error.DESCRIPTION,
        epilog="example:\n  mpiexec -n 9 mpiattn bench error --plot error.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_error.add_arguments(error)
    attention = benchmarks.add_parser(
        "attention",
        help="algorithms beside themselves without messages, one kernel call and torch",
        description=bench_attention.__doc__,
        epilog="example:\n  run/gpu.sh -n 4 mpiattn bench attention --algorithms ring,mesh:2x2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_attention.add_arguments(attention)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Run the benchmark that the command line names; collective."""
    if args.benchmark == "overlap":
        return bench_overlap.main(args, comm)
    if args.benchmark == "error":
        return bench_error.main(args, comm)
    if args.benchmark == "attention":
        return bench_attention.main(args, comm)
    if min(*args.head_dims, *args.tokens, args.heads, args.rounds) < 1:
        raise InputError("--head-dims, --tokens, --heads and --rounds are at least 1")
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"{args.json.parent}: no such folder")
    environment = env.environment(comm)
    patiently(comm, lambda: kernel(args, comm, environment))  # rank 0 alone: one thread is measured
    return 0


def numbers(text: str) -> list[int]:
    """Parse whole numbers between commas."""
    return [int(part) for part in text.split(",")]


def kernel(args: argparse.Namespace, comm: Communicator, environment: dict[str, Any]) -> None:
    """Measure every shape, then print the table and write the JSON file."""
    shapes = list(itertools.product(args.head_dims, args.tokens))
    progress = bar(comm, total=len(shapes) * (args.rounds + 2), unit="round")
    results = []
    with one_thread():
        for head_dim, tokens in shapes:
            progress.set_postfix_str(f"head_dim {head_dim}, {tokens} tokens")
            random = np.random.default_rng(0)
            shape = 1, args.heads, tokens, head_dim
            q, k, v, d_out = (random.standard_normal(shape).astype(DTYPES[args.dtype]) for _ in range(4))
            peaks = peak_bytes(q, k, v, d_out, MASKS[args.mask])
            progress.update()
            timed = {
                name: {"kernel": own, "products": products(q, k, v, d_out, MASKS[args.mask], name)}
                for name, own in zip(TARGETS, runs(q, k, v, d_out, MASKS[args.mask]), strict=True)
            }
            timed["forward"]["textbook"] = functools.partial(textbook, q, k, v, args.mask == "causal")
            if importlib.util.find_spec("torch"):
                for name, run in torch_runs(q, k, v, d_out, args.mask == "causal").items():
                    timed[name]["torch"] = run
            seconds = interleave(timed, args.rounds, progress.update)
            results += [
                report(head_dim, tokens, name, seconds[name], peak) for name, peak in zip(TARGETS, peaks, strict=True)
            ]
    progress.close()
    rank = environment["ranks"][0]
    about = {name: environment[name] for name in ("mpiattn", "numpy", "python", "platform")}
    about |= {"cpu": rank["cpu"], "blas": rank["blas"], "blas_threads": 1}
    about["torch"] = version("torch") if importlib.util.find_spec("torch") else None
    command = " ".join(["mpiattn", *sys.argv[1:]])
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()))
    print(f"{args.heads} heads, {args.dtype}, mask {args.mask}, CPU time, median of {args.rounds} rounds; {command}")
    print_results(results)
    if args.json:
        document = {"command": command, "environment": about, "heads": args.heads, "dtype": args.dtype}
        document |= {"mask": args.mask, "rounds": args.rounds, "targets": TARGETS, "results": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS, OpenMP and torch to one thread."""
    with threadpool_limits(1):
        if importlib.util.find_spec("torch"):
            import torch

            torch.set_num_threads(1)
        yield


def runs(q: Array, k: Array, v: Array, d_out: Array, mask: Mask) -> Iterator[Callable[[], object]]:
    """Yield the kernel's forward and backward, each with accumulators of its own, set back at every run."""
    numpy_kernel, dtype = NumpyKernel(mask), accumulator(q.dtype)
    positions = np.arange(q.shape[2])
    out, lse = np.empty(d_out.shape, dtype), np.empty(q.shape[:3], dtype)
    d_q, d_k, d_v = np.empty(q.shape, dtype), np.empty(k.shape, dtype), np.empty(v.shape, dtype)

    def forward() -> None:
        out[...], lse[...] = 0, -np.inf
        numpy_kernel.forward(q, k, v, positions, positions, out, lse)

    forward()
    row_delta = delta(d_out, out)

    def backward() -> None:
        d_q[...], d_k[...], d_v[...] = 0, 0, 0
        numpy_kernel.backward(q, k, v, d_out, lse, row_delta, positions, positions, d_q, d_k, d_v)

    yield forward
    yield backward


def products(q: Array, k: Array, v: Array, d_out: Array, mask: Mask, name: str) -> Callable[[], object]:
    """Return the matrix products that the kernel can't do without, of the same tiles, and nothing else."""
    positions = np.arange(q.shape[2])
    q, k, v, d_out = (x[0].astype(accumulator(x.dtype)) for x in (q, k, v, d_out))
    rows_of_tiles = [
        (
            [[np.ascontiguousarray(x[h, rows].T) for x in (q, d_out)] for h in range(len(q))],
            [(tile, slice(rows.start + tile.queries.start, rows.start + tile.queries.stop)) for tile in tiles],
        )
        for rows, tiles in plan(mask, positions, positions)
    ]
    sizes = {(t.keys.stop - t.keys.start, t.queries.stop - t.queries.start) for _, ts in rows_of_tiles for t, _ in ts}
    scores = {size: [np.empty(size, q.dtype) for _ in range(2)] for size in sizes}
    like_keys = {size: np.empty((size, q.shape[2]), q.dtype) for size, _ in sizes}
    like_queries = {size: np.empty((q.shape[2], size), q.dtype) for _, size in sizes}

    def run() -> None:
        for h in range(len(q)):
            for columns, tiles in rows_of_tiles:
                query, d_row = columns[h]
                for tile, rows in tiles:
                    keys, values = k[h, tile.keys], v[h, tile.keys]
                    size = len(keys), rows.stop - rows.start
                    score, d_score = scores[size]
                    np.matmul(keys, query[:, tile.queries], out=score)
                    if name == "forward":
                        np.matmul(values.T, score, out=like_queries[size[1]])
                        continue
                    np.matmul(values, d_row[:, tile.queries], out=d_score)
                    np.matmul(score, d_out[h, rows], out=like_keys[size[0]])
                    np.matmul(d_score, q[h, rows], out=like_keys[size[0]])
                    np.matmul(keys.T, d_score, out=like_queries[size[1]])

    return run


def textbook(q: Array, k: Array, v: Array, causal: bool) -> None:
    """Compute softmax(q k^T) v as the formula reads, head by head."""
    dtype = accumulator(q.dtype)
    for h in range(q.shape[1]):
        query, keys, values = (x[0, h].astype(dtype) for x in (q, k, v))
        scores = query @ keys.T / dtype.type(np.sqrt(q.shape[3]))
        if causal:
            scores = np.where(np.tri(len(query), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights / weights.sum(axis=1, keepdims=True) @ values


def torch_runs(q: Array, k: Array, v: Array, d_out: Array, causal: bool) -> Timed:
    """Return torch's forward and backward on the same numbers."""
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention
    dtype = getattr(torch, q.dtype.name)
    inputs = [torch.from_numpy(x.astype(np.float64)).to(dtype).requires_grad_() for x in (q, k, v)]
    gradient = torch.from_numpy(d_out.astype(np.float64)).to(dtype)
    out = attention(*inputs, is_causal=causal)

    def forward() -> None:
        with torch.no_grad():
            attention(*inputs, is_causal=causal)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True),
    }


def interleave(timed: dict[str, Timed], rounds: int, done: Callable[[], object]) -> dict[str, dict[str, list[float]]]:
    """Run all in turn, round after round; return the CPU seconds of each, without those of a first round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {other: [] for other in runs} for name, runs in timed.items()}
    for number in range(rounds + 1):
        for name, runs in timed.items():
            for other, run in runs.items():
                start = time.process_time()
                run()
                if number:
                    seconds[name][other].append(time.process_time() - start)
        done()
    return seconds


def peak_bytes(q: Array, k: Array, v: Array, d_out: Array, mask: Mask) -> list[int]:
    """Return the most memory that forward and backward take beyond their inputs, results included."""
    positions, dtype = np.arange(q.shape[2]), accumulator(q.dtype)
    peaks = []
    tracemalloc.start()
    out, lse = np.zeros(d_out.shape, dtype), np.full(q.shape[:3], -np.inf, dtype)
    NumpyKernel(mask).forward(q, k, v, positions, positions, out, lse)
    peaks.append(tracemalloc.get_traced_memory()[1])
    row_delta = delta(d_out, out)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    gradients = np.zeros(q.shape, dtype), np.zeros(k.shape, dtype), np.zeros(v.shape, dtype)
    NumpyKernel(mask).backward(q, k, v, d_out, lse, row_delta, positions, positions, *gradients)
    peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return peaks


def report(head_dim: int, tokens: int, name: str, seconds: dict[str, list[float]], peak: int) -> dict[str, Any]:
    """Return what is known of one shape and pass."""
    fractions = {
        other: statistics.median(theirs / own for theirs, own in zip(seconds[other], seconds["kernel"], strict=True))
        for other in seconds
        if other != "kernel"
    }
    return {
        "head_dim": head_dim,
        "tokens": tokens,
        "pass": name,
        "median_seconds": {other: statistics.median(times) for other, times in seconds.items()},
        "fractions": fractions,
        "targets_met": {
            other: fractions[other] >= least for other, least in TARGETS[name].items() if other in fractions
        },
        "peak_bytes": peak,
        "seconds": seconds,
    }


def print_results(results: list[dict[str, Any]]) -> None:
    """Print the table, and which targets it meets."""
    others = [other for other in ("products", "textbook", "torch") if any(other in r["fractions"] for r in results)]
    rows = []
    for result in results:
        missed = [other for other, met in result["targets_met"].items() if not met]
        row = [result["head_dim"], result["tokens"], result["pass"], f"{1e3 * result['median_seconds']['kernel']:.0f}"]
        for other in others:
            known = other in result["fractions"]
            row += (
                [f"{1e3 * result['median_seconds'][other]:.0f}", f"{result['fractions'][other]:.2f}"]
                if known
                else ["", ""]
            )
        rows.append([*row, f"{result['peak_bytes'] / 1e6:.1f}", f"missed: {', '.join(missed)}" if missed else "met"])
    columns = [name for other in others for name in (f"{other}\nms", f"of\n{other}")]
    headers = ["head_dim", "tokens", "pass", "kernel\nms", *columns, "peak\nMB", "targets"]
    print(tabulate(rows, headers, disable_numparse=True, stralign="right"))
    for name, targets in TARGETS.items():
        wanted = " and ".join(f"{least:.2f} of {other}" for other, least in targets.items() if other in others)
        print(
            f"Targets {name}: at least {wanted} (set for float32, full mask, head_dim from 64, 2048 tokens and more)."
        )
