"""Run one algorithm on a file of queries, keys and values, and write its output, for use from scripts.

The output file has out and lse; with --backward also d_q, d_k, d_v, for the input's d_out (or a random one).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..algorithms import ALGORITHMS
from ..algorithms.shares import gather
from ..arrays.operations import on_host
from ..machines import writing
from ..messages.message import Communicator
from ..problems import mask
from ..problems.layout import LAYOUTS
from ..trace import owners
from ..trace.comm import TracedComm
from ..trace.file import write
from . import chosen, files, gpu, inputs
from .chosen import AUTO
from .root import on_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn run`."""
    parser.add_argument(
        "--algorithm",
        type=chosen.one,
        default="mesh",
        metavar="NAME",
        help=f"of {', '.join(ALGORITHMS)}, or auto: what the planner chooses (default mesh); {chosen.SPELLING}",
    )
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help="that auto plans for: a name or a file of `mpiattn calibrate` (default: a guess)",
    )
    chosen.add_grid(parser, "nearest to a square")
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="default zigzag with a causal mask without a window, else contiguous"
    )
    parser.add_argument("--mask", type=mask.argument, default="causal", help=mask.HELP)
    parser.add_argument("--scale", type=float, help="of the scores (default 1/sqrt(head_dim))")
    parser.add_argument("--backward", action="store_true", help="write the gradients too")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".npz or .safetensors")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what each rank did, for mpiattn trace")
    inputs.add_arguments(parser)
    gpu.add_arguments(parser)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Run forward, and backward where asked, and write the result on rank 0."""
    chosen.check_machine(args)
    chosen.check_grid(args, [args.algorithm])
    given = on_root(comm, lambda: inputs.load(args, args.backward))
    on_root(comm, lambda: files.check_output(args.output))
    on_root(comm, lambda: writing.check(args.trace))
    xp = gpu.namespace(args, comm)
    options = {"layout": args.layout, **inputs.options(args), **gpu.options(args)}
    name, arguments = chosen.on_grid(args.algorithm, args, comm.Get_size())
    traced = TracedComm(comm)
    over = traced if args.trace else comm
    if name == AUTO:
        choice = inputs.choose(comm, given, args, args.backward)
        if comm.Get_rank() == 0:
            print(*choice.explain(), sep="\n  ")
        built: Any = choice.attention(over, **options)
    else:
        built = ALGORITHMS[name](over, **options, **arguments)
    with built as attention:
        comm = attention.comm.comm if args.trace else attention.comm  # auto may have put the ranks in another order
        shapes, (q, k, v, d_out), features = inputs.share(given, comm, attention, args, xp)
        with traced.trace.phase("forward"):
            out, saved = attention.forward(q, k, v, **features)
        results = {"out": out, "lse": saved.lse}
        if args.backward:
            with traced.trace.phase("backward"):
                results |= dict(zip(("d_q", "d_k", "d_v"), attention.backward(d_out, saved), strict=True))
        whole = {}
        for name, array in results.items():
            like = "out" if name == "lse" else name.removeprefix("d_")
            shape = shapes[like][: array.ndim]
            where, copies = attention.owned(like, shapes), like in attention.copied
            whole[name] = gather(on_host(array), comm, where, shape=shape, copies=copies)
    if args.trace:
        owners.name_blocks(traced.trace, saved.problem)
        write(traced, traced.trace, args.trace)
    gathered = {name: array for name, array in whole.items() if array is not None}
    on_root(comm, lambda: files.write(args.output, gathered, args.axes or files.AXES[0]))
    if comm.Get_rank() == 0:
        print(f"{args.output}: {', '.join(whole)}")
    return 0
