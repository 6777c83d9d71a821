"""`mpiattn bench kernel`: the NumPy kernel against its own matrix products, a textbook version and torch."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays import FLOAT_NAMES
from ...arrays import dtype as dtype_of
from ...errors import InputError
from ...kernels.torch.choice import importable
from ...machines import writing
from ...messages.message import Communicator
from ...planner.units import counts
from ...problems.mask import Causal, Full, Mask
from .. import terminal
from ..env.environment import environment
from ..progress import bar
from ..root import on_root, patiently
from .block import interleave, one_thread, peak_bytes, products, runs, textbook, torch_runs

MASKS: dict[str, Mask] = {"full": Full(), "causal": Causal()}

TARGETS = {"forward": {"products": 0.80, "torch": 0.85}, "backward": {"products": 0.80, "torch": 0.80}}
"""The least speed wanted of the kernel, as a fraction of what it is compared with."""

DESCRIPTION = """\
Measure the NumPy kernel on one thread: forward and backward of one rank's block.

Each is compared, in rounds in which all take turns, with
  products  its matrix products alone, of the same tiles: two forward, five backward. What is left to the
            kernel is the softmax in between; 1.00 would mean that it costs nothing.
  textbook  softmax(q k^T) v with all scores of a head in memory (forward only)
  torch     torch.nn.functional.scaled_dot_product_attention, where torch is installed
  torch kernel  what kernel="torch" computes: the same, block by block, with (out, lse)
Times are CPU time of this one thread, so that what else runs on the machine disturbs them least. A fraction
is the other's time over the kernel's, median over the rounds; over 1 the kernel is the faster one.
"""

EXAMPLES = """\
examples:
  mpiattn bench kernel                                       six shapes, some minutes
  mpiattn bench kernel --tokens 2048 --head-dims 64 --rounds 9
  mpiattn bench kernel --mask causal --json causal.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn bench kernel`."""
    parser.add_argument("--head-dims", type=numbers, default=[64, 128], metavar="D,...", help="default 64,128")
    parser.add_argument(
        "--tokens", type=counts, default=[2048, 4096, 8192], metavar="T,...", help="default 2048,4096,8192"
    )
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5, after one that is not timed")
    parser.add_argument("--mask", choices=MASKS, default="full", help="default full")
    parser.add_argument("--dtype", choices=FLOAT_NAMES, default="float32", help="of the inputs (default float32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the environment")


def numbers(text: str) -> list[int]:
    """Parse whole numbers between commas."""
    return [int(part) for part in text.split(",")]


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure on rank 0 alone, since one thread is measured, and print there."""
    if min(*args.head_dims, args.heads, args.rounds) < 1:
        raise InputError("--head-dims, --heads and --rounds are at least 1")
    on_root(comm, lambda: writing.check(args.json))
    surroundings = environment(comm)
    patiently(comm, lambda: measure(args, comm, surroundings))
    return 0


def measure(args: argparse.Namespace, comm: Communicator, surroundings: dict[str, Any]) -> None:
    """Measure every shape, then print the table and write the JSON file."""
    shapes = list(itertools.product(args.head_dims, args.tokens))
    progress = bar(comm, total=len(shapes) * (args.rounds + 2), unit="round")
    results = []
    with one_thread():
        for head_dim, tokens in shapes:
            progress.set_postfix_str(f"head_dim {head_dim}, {tokens} tokens")
            random = np.random.default_rng(0)
            shape = 1, args.heads, tokens, head_dim
            q, k, v, d_out = (random.standard_normal(shape).astype(dtype_of(args.dtype)) for _ in range(4))
            peaks = peak_bytes(q, k, v, d_out, MASKS[args.mask])
            progress.update()
            timed = {
                name: {"kernel": own, "products": products(q, k, v, d_out, MASKS[args.mask], name)}
                for name, own in zip(TARGETS, runs(q, k, v, d_out, MASKS[args.mask]), strict=True)
            }
            timed["forward"]["textbook"] = functools.partial(textbook, q, k, v, args.mask == "causal")
            if importable():
                timed["forward"]["torch kernel"], timed["backward"]["torch kernel"] = runs(
                    q, k, v, d_out, MASKS[args.mask], "torch"
                )
                for name, run in torch_runs(q, k, v, d_out, args.mask == "causal").items():
                    timed[name]["torch"] = run
            seconds = interleave(timed, args.rounds, progress.update)
            results += [
                report(head_dim, tokens, name, seconds[name], peak) for name, peak in zip(TARGETS, peaks, strict=True)
            ]
    progress.close()
    rank = surroundings["ranks"][0]
    about = {name: surroundings[name] for name in ("mpiattn", "numpy", "python", "platform")}
    about |= {"cpu": rank["cpu"], "blas": rank["blas"], "blas_threads": 1}
    about["torch"] = version("torch") if importable() else None
    command = " ".join(["mpiattn", *sys.argv[1:]])
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()))
    print(f"{args.heads} heads, {args.dtype}, mask {args.mask}, CPU time, median of {args.rounds} rounds; {command}")
    print_results(results)
    if args.json:
        document = {"command": command, "environment": about, "heads": args.heads, "dtype": args.dtype}
        document |= {"mask": args.mask, "rounds": args.rounds, "targets": TARGETS, "results": results}
        writing.write_json(args.json, document)


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
    others = [
        other
        for other in ("products", "textbook", "torch", "torch kernel")
        if any(other in r["fractions"] for r in results)
    ]
    rows = []
    for result in results:
        missed = [other for other, met in result["targets_met"].items() if not met]
        row = [result["head_dim"], result["tokens"], result["pass"], f"{1e3 * result['median_seconds']['kernel']:.0f}"]
        for other in others:
            compared = other in result["fractions"]
            row += (
                [f"{1e3 * result['median_seconds'][other]:.0f}", f"{result['fractions'][other]:.2f}"]
                if compared
                else ["", ""]
            )
        rows.append([*row, f"{result['peak_bytes'] / 1e6:.1f}", f"missed: {', '.join(missed)}" if missed else "met"])
    columns = [name for other in others for name in (f"{other}\nms", f"of\n{other}")]
    headers = ["head_dim", "tokens", "pass", "kernel\nms", *columns, "peak\nMB", "targets"]
    drop = [f"{other}\nms" for other in others]
    print(terminal.table(rows, headers, drop, disable_numparse=True, stralign="right"))
    for name, targets in TARGETS.items():
        wanted = " and ".join(f"{least:.2f} of {other}" for other, least in targets.items() if other in others)
        print(
            f"Targets {name}: at least {wanted} (set for float32, full mask, head_dim from 64, 2048 tokens and more)."
        )
