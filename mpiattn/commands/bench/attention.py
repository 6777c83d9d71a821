"""`mpiattn bench attention`: algorithms beside themselves without messages, one kernel call and torch."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import socket
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ... import arrays
from ...algorithms.spelling import spell
from ...errors import InputError
from ...machines import writing
from ...messages.device.probe import takes_device_memory
from ...messages.message import Communicator
from ...planner.units import counts
from ...problems import mask
from ...problems.mask import Causal
from ...problems.problem import PARTIALS
from .. import chosen, gpu, terminal
from ..env.environment import environment
from ..root import on_root
from . import torch_flash4
from .contenders import PASSES, Contender, Setting, algorithm, one_call
from .torch_parallel import torch_contenders

DESCRIPTION = """\
Measure attention on all ranks: speed, and how much of the messages is not hidden behind the compute.

In rounds in which all take turns, each algorithm is measured beside

  without messages       the same calls with the messages left out: what is lost against it is exposed communication
  one call               one kernel call, a rank's queries against its own keys unmasked, looped on all ranks at once
  torch context_parallel torch's own, with cuDNN and, where installed, FlashAttention-4 (FA4), by all-gather and by
                         all-to-all  (where torch finds the GPUs)
  torch one GPU          torch's attention of a rank's share alone, looped on all ranks at once

Times are the slowest rank's; speeds count the products that the mask leaves: 4 pairs * heads * head_dim operations
forward, 2.5 times as many backward. A fraction is a median over the rounds.
"""

EXAMPLES = """\
example:
  run/gpu.sh -n 4 mpiattn bench attention --algorithms ring,mesh:2x2
"""

WORK = {"forward": 1.0, "forward+backward": 3.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn bench attention`."""
    chosen.add_algorithms(parser, "ring,mesh")
    parser.add_argument("--tokens", type=counts, metavar="N,...", help="default 16K,64K on GPUs, else 2K")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="default 32")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="default as many as query heads")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--dtype", help="default bfloat16 on GPUs, else float32")
    parser.add_argument("--mask", type=mask.argument, default=Causal(), help=mask.HELP)
    parser.add_argument("--layout", help="default zigzag with a causal mask without a window, else contiguous")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default 7")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every timing")
    parser.add_argument("--partials", choices=PARTIALS, default="wide", help="how partial sums travel (default wide)")
    gpu.add_arguments(parser, "cupy if there is a GPU")


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure, and print on rank 0."""
    xp = gpu.namespace(args, comm, "cupy" if arrays.gpus() else "numpy")
    on_gpu = xp is not np
    try:
        dtype = arrays.dtype(args.dtype or ("bfloat16" if on_gpu else "float32"))
    except ValueError as error:
        raise InputError(f"--dtype: {error}") from None
    lengths = args.tokens or ([2**14, 2**16] if on_gpu else [2**11])
    for asked in args.algorithms:
        chosen.on_grid(asked, args, comm.Get_size())
    if min(args.heads, args.head_dim, args.rounds) < 1:
        raise InputError("--heads, --head-dim and --rounds are at least 1")
    if args.no_torch and not on_gpu:
        raise InputError("--no-torch does nothing on CPUs, where torch is not measured")
    on_root(comm, lambda: writing.check(args.json))
    options = {"layout": args.layout, "partials": args.partials, **gpu.options(args)}

    def say(*lines: str, sep: str = " ") -> None:
        if comm.Get_rank() == 0:
            print(*lines, sep=sep, flush=True)

    say("command:", " ".join(["mpiattn", *sys.argv[1:]]))
    say("machine:", *describe(comm, xp), sep="\n  ")
    report: list[dict[str, Any]] = []
    for tokens in lengths:
        kv_heads = args.kv_heads or args.heads
        setting = Setting(comm, xp, tokens, args.heads, kv_heads, args.head_dim, dtype, args.mask, options)
        contenders = []
        for name, arguments in args.algorithms:
            contenders += algorithm(setting, spell(name, arguments), name, arguments)
        contenders.append(one_call(setting))
        if on_gpu and not args.no_torch and importlib.util.find_spec("torch") and kv_heads == args.heads:
            contenders += torch_contenders(setting)
        for name, _, contender in itertools.product(PASSES, range(args.rounds), contenders):
            contender.seconds[name].append(contender.measure(name, comm, xp))
        say(
            f"\n{tokens} tokens, {args.heads} heads of {args.head_dim}, {dtype.name}, {args.mask}, "
            f"{comm.Get_size()} ranks"
        )
        say(table(setting, contenders))
        task = {"tokens": tokens, "ranks": comm.Get_size(), "heads": args.heads, "kv_heads": kv_heads}
        task |= {"head_dim": args.head_dim, "dtype": dtype.name, "mask": str(args.mask), "partials": args.partials}
        report += [{**task, "name": c.name, "seconds": c.seconds} for c in contenders]
        del contenders
        if on_gpu:
            xp.get_default_memory_pool().free_all_blocks()
    if args.json:
        on_root(comm, lambda: writing.write_json(args.json, report))
    return 0


def describe(comm: Communicator, xp: ModuleType) -> list[str]:
    """Return what this runs on, a line each."""
    surroundings = environment(comm, on_gpus=xp is not np)
    what = [surroundings["mpi"]]
    if xp is not np:
        name = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)["name"].decode()
        shared = set(comm.allgather((socket.gethostname(), xp.cuda.Device().pci_bus_id)))
        what.insert(0, f"{len(shared)} x {name}, {comm.Get_size()} ranks")
        what += [f"CuPy {xp.__version__}", surroundings["gpu_kernel"]]
        what.append(f"messages of device memory: {'yes' if takes_device_memory(comm, xp) else 'no'}")
    return what


def table(setting: Setting, contenders: list[Contender]) -> str:
    """Return the speeds and fractions as a table."""
    by_name = {contender.name: contender for contender in contenders}
    torch = [contender for contender in contenders if contender.name.startswith("torch context_parallel")]
    with_flash4 = [contender for contender in torch if contender.name.endswith(torch_flash4.LABEL)]
    beside = {
        "x torch\nparallel": [contender for contender in torch if contender not in with_flash4],
        "x torch\nwith FA4": with_flash4,
    }
    others = {head: group for head, group in beside.items() if group}
    rows = []
    for contender in contenders:
        row: list[Any] = [contender.name]
        quiet = by_name.get(f"{contender.name} without messages")
        for name in PASSES:
            seconds = contender.seconds[name]
            median = statistics.median(seconds)
            rate = setting.operations * WORK[name] * contender.fraction / setting.comm.Get_size() / median / 1e12
            row += [f"{median * 1e3:.3f}", f"{rate:.3g}"]
            row.append(_ratio(quiet.seconds[name], seconds) if quiet else "")
            for other in others.values():
                best = min(other, key=lambda c: statistics.median(c.seconds[name]))
                row.append(_ratio(best.seconds[name], seconds) if contender.fraction == 1 else "")
        rows.append(row)
    heads = [text for name in PASSES for text in (f"{name}\nms", "TFLOP/s\nper rank", "of without\nmessages", *others)]
    drop = (*reversed(others), "forward\nms")
    align = ("left", *["right"] * len(heads))
    return terminal.table(rows, ["", *heads], drop, disable_numparse=True, colalign=align)


def _ratio(others: list[float], own: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(others, own, strict=True)):.3f}"
