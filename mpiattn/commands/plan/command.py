"""Say which algorithm and which grid suit a cluster, and why.

Candidates are run in virtual time, which needs no MPI; the fastest that the memory holds comes first. Each line says
how the grid lies on the nodes (rows x columns inside a node), the tile of scores that a rank computes, the time of
each pass, how long the rank that waits longest waits for messages, what a rank receives, and what it holds.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ... import machines
from ...machines import writing
from ...machines.machine import Machine
from ...messages.message import Communicator
from ...planner.candidates import tile
from ...planner.search import plan
from ...planner.task import Task
from ...planner.units import count, in_bytes, in_seconds, size
from ...problems import layout, mask
from ...problems.mask import Causal
from ...problems.problem import PARTIALS
from .. import charts
from ..progress import bar
from ..terminal import table
from .curve import tile_curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn plan`."""
    parser.add_argument("--tokens", type=count, required=True, metavar="N", help="such as 128K or 1M")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads (default: as many)")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--v-head-dim", type=int, metavar="N", help="of the values (default: as --head-dim)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--dtype", default=None, help="default bfloat16 where the machine has it, else float32")
    parser.add_argument("--mask", type=mask.argument, default=Causal(), help="default causal")
    parser.add_argument("--layout", choices=layout.LAYOUTS, help="default: as the algorithms choose")
    parser.add_argument("--partials", choices=PARTIALS, default="wide", help="how partial sums travel (default wide)")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks, one a GPU or a core")
    parser.add_argument(
        "--machine", default="laptop", metavar="NAME", help=f"{', '.join(machines.presets())}, or a TOML file"
    )
    parser.add_argument("--backward", action="store_true", help="forward and backward (default: forward)")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="of a rank, such as 80GB (default: the machine's)")
    parser.add_argument("--algorithms", metavar="NAME,...", help="only these")
    parser.add_argument(
        "--quick", action="store_true", help="run only the few with the best estimates, as algorithm=auto does"
    )
    parser.add_argument(
        "--curve",
        type=Path,
        metavar="FILE",
        help="draw time against the tile's shape (.png, .svg, .pdf)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan")


def task_of(args: argparse.Namespace, machine: Machine) -> Task:
    """Return the task that the arguments describe."""
    dtype = args.dtype or ("bfloat16" if "bfloat16" in machine.compute else "float32")
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    return Task(
        args.tokens, args.heads, kv_heads, args.head_dim, args.batch, dtype, args.mask, args.backward, args.layout,
        v_head_dim=args.v_head_dim, partials=args.partials,
    )  # fmt: skip


def main(args: argparse.Namespace, comm: Communicator | None = None) -> int:
    """Print the candidates in the order of their time, and why the first one is; on rank 0 alone."""
    if comm is not None and comm.Get_rank() > 0:
        return 0
    machine = machines.load(args.machine)
    task = task_of(args, machine)
    if args.curve:
        charts.check(args.curve)
    writing.check(args.json)
    names = args.algorithms.split(",") if args.algorithms else None
    shown = bar(None, total=None, unit="candidate")

    def progress(name: str) -> None:
        shown.set_postfix_str(name, refresh=False)
        shown.update()

    result = plan(task, machine, args.ranks, args.memory, names, args.quick, progress)
    shown.close()
    rows = [
        (
            outcome.candidate.name,
            outcome.candidate.placement,
            " x ".join(map(str, tile(task, args.ranks, outcome.candidate))),
            in_seconds(outcome.forward),
            in_seconds(outcome.backward) if task.backward else "",
            in_seconds(outcome.exposed),
            in_bytes(outcome.received),
            in_bytes(outcome.peak),
        )
        for outcome in result.outcomes
    ]
    headers = ("algorithm", "in a node", "tile, tokens", "forward", "backward", "waiting", "received", "memory")
    print(f"{task.tokens} tokens, {task.heads} heads ({task.kv_heads} for K/V) of {task.head_dim}, {task.dtype}, "
          f"mask {task.mask}, on {args.ranks} ranks of {machine.name}")  # fmt: skip
    drop = ("in a node", "tile, tokens", "waiting", "memory")
    print(table(rows, headers, drop, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 5))
    print(f"\n{result.best.candidate.title}", *result.explain(), sep="\n  ")
    if args.json:
        document = {
            "task": {**dataclasses.asdict(task), "mask": str(task.mask)},
            "machine": machine.name,
            "ranks": args.ranks,
            "memory": result.memory,
            "why": result.explain(),
            "outcomes": [
                {**dataclasses.asdict(outcome), "tile": tile(task, args.ranks, outcome.candidate)}
                for outcome in result.outcomes
            ],
            "left_out": [{"candidate": candidate.name, "why": why} for candidate, why in result.left_out],
        }
        writing.write_json(args.json, document)
    if args.curve:
        tile_curve(task, machine, args.ranks, args.curve)
    return 0
