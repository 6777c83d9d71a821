"""Print the order of messages and blocks in one rank's Mesh-Attention tile (arXiv 2512.20968); draw or write it.

Q slot j is the Q chunk that has travelled j hops along the grid row, KV slot i the K/V chunk that has travelled
i hops along the grid column; slot 0 is the rank's own. Every rank does the same step at the same time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

from ...errors import InputError
from ...machines import writing
from ...problems import grid
from ...schedule.search import backward, forward
from ...schedule.steps import HopTimes, Step, makespan, relative
from .. import charts
from ..terminal import width
from .figure import draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn schedule`."""
    parser.add_argument("grid", type=grid.argument, metavar="ROWSxCOLS", help="the grid of ranks, such as 4x4")
    parser.add_argument("--backward", action="store_true", help="the backward pass (default: forward)")
    parser.add_argument("--kv-ratio", type=int, metavar="G", help="query heads for each K/V head (default 1)")
    parser.add_argument(
        "--head-dim", type=int, metavar="N", help="head_dim, beside which lse and delta count (default 64)"
    )
    parser.add_argument(
        "--costs",
        metavar="NUMBERS",
        help="times of one hop and of one block: q,kv,o,block, or backward q,kv,dq,dkv,block "
        "(default: hops by their bytes in float32, and blocks that take as long as all hops)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the schedule (png, pdf, svg)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the schedule")


def main(args: argparse.Namespace) -> int:
    """Print one schedule; draw or write it where asked."""
    rows, cols = args.grid
    names = ["q", "kv", "dq", "dkv", "block"] if args.backward else ["q", "kv", "o", "block"]
    try:
        writing.check(args.json)
        if args.plot:
            charts.check(args.plot)
        sizes = {"--kv-ratio": args.kv_ratio, "--head-dim": args.head_dim}
        for name, size in sizes.items():
            if args.costs and size is not None:
                raise ValueError(f"{name} and --costs exclude each other: costs are given or follow from the sizes")
            if size is not None and size < 1:
                raise ValueError(f"{name} is a whole number from 1, not {size}")
        if args.costs:
            costs = HopTimes(**read(args.costs, names))
        else:
            heads, head_dim = args.kv_ratio or 1, args.head_dim or 64
            costs = relative(backward=args.backward, heads=heads, head_dim=head_dim).balanced(rows, cols)
    except ValueError as error:
        raise InputError(str(error)) from None
    steps = (backward if args.backward else forward)(rows, cols, costs)
    times = {
        "time": makespan(steps, costs),
        "communication": costs.communication(rows, cols),
        "compute": rows * cols * costs.block,
    }
    direction = "backward" if args.backward else "forward"
    unit = "the unit of --costs" if args.costs else "hops of a chunk of Q"
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in times.items())
    title = f"Mesh-Attention, {rows} x {cols}, {direction}, in {unit}: {numbers}"
    print(title, text(steps), sep="\n\n")
    if args.plot:
        draw(steps, costs, args.plot, title)
    if args.json:
        report = {"rows": rows, "cols": cols, "direction": direction, "costs": asdict(costs), **times}
        report["steps"] = [asdict(step) for step in steps]
        writing.write_json(args.json, report)
    return 0


def read(text: str, names: Sequence[str]) -> dict[str, float]:
    """Return the numbers of `--costs` by their names, or raise ValueError."""
    parts = text.split(",")
    if len(parts) != len(names):
        raise ValueError(f"--costs takes {len(names)} numbers, {','.join(names)}, not {len(parts)}")
    numbers = {}
    for name, part in zip(names, parts, strict=True):
        try:
            numbers[name] = float(part)
        except ValueError:
            raise ValueError(f"--costs takes numbers, {','.join(names)}, not {part!r}") from None
    return numbers


def text(steps: Sequence[Step]) -> str:
    """Table of steps: what arrives, what leaves, and the blocks computed meanwhile."""
    table = []
    for number, step in enumerate(steps, 1):
        message = f"{step.message.value} {step.hop}" if step.message else ""
        table.append((number, message, " ".join(f"{i},{j}" for i, j in step.blocks)))
    headers = ("step", "message, slot", "blocks (KV slot,Q slot)")
    return tabulate(table, headers=headers, maxcolwidths=[None, None, max(width() - 28, 20)])
