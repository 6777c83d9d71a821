"""`mpiattn bench torch`: training steps of a model in torch by each algorithm, beside torch's context parallelism."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ... import arrays
from ...algorithms import ALGORITHMS, Attention
from ...algorithms.spelling import Asked
from ...errors import InputError
from ...machines import writing
from ...messages.message import Communicator
from ...planner.units import counts
from ...problems.mask import Causal
from .. import chosen, gpu
from ..env.environment import environment
from ..progress import bar
from ..root import on_root
from .attention import describe

if TYPE_CHECKING:
    from .torch_llama import Sizes

DESCRIPTION = """\
Measure training steps of LLaMA's layers in torch on all ranks: forward, backward, the sum of the gradients, SGD. A
sequence of random tokens is spread over the ranks; weights are random, and every rank has all of them.

Attention is that of mpiattn.torch, by each algorithm, and torch's own context parallelism, by all-gather and by
all-to-all: there gradients are summed by torch too, in the dtype of the weights, else by mpiattn.torch, in float32.
The learning rate is 0: all have the same loss. They take turns, in which the second step is timed; medians of

  s a step         of the slowest rank
  tokens/s a rank  the tokens of a step, by its seconds and the number of ranks
  waiting          share of a step that forward and backward take less without attention's messages
  gradients        share of a step in which the gradients are summed
  GiB a GPU        in use after a step on the GPU that has most, as its driver says
  x torch          steps in the time of one by torch's context parallelism, the better of the two
"""

EXAMPLES = """\
example:
  run/gpu.sh -n 4 mpiattn bench torch --tokens 32K,128K --layers 4 --recompute
"""

ON_GPUS = {"layers": 4, "hidden": 4096, "heads": 32, "vocabulary": 32000}
ON_CPUS = {"layers": 2, "hidden": 128, "heads": 4, "vocabulary": 1000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn bench torch`."""
    parser.add_argument(
        "--algorithms", type=partial(chosen.several, among=tuple(ALGORITHMS)), default="ring,mesh,ulysses",
        metavar="NAME,...", help=f"of those that share out tokens (default ring,mesh,ulysses); {chosen.SPELLING}",
    )  # fmt: skip
    parser.add_argument("--tokens", type=counts, metavar="N,...", help="default 32K on GPUs, else 1K")
    for name, text in {"layers": "", "hidden": "features of a token; ", "heads": "", "vocabulary": ""}.items():
        default = f"{text}default {ON_GPUS[name]} on GPUs, else {ON_CPUS[name]}"
        parser.add_argument(f"--{name}", type=whole, metavar="N", help=default)
    parser.add_argument("--kv-heads", type=whole, metavar="N", help="default as many as query heads")
    parser.add_argument("--dtype", help="default bfloat16 on GPUs, else float32")
    text = "keep no more of a layer than its input, and compute the rest again in backward"
    parser.add_argument("--recompute", action="store_true", help=text)
    parser.add_argument("--rounds", type=whole, default=3, metavar="N", help="default 3")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch's context parallelism")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every timing, with the environment")
    gpu.add_arguments(parser, "cupy if there is a GPU")


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure, and print on rank 0."""
    xp = gpu.namespace(args, comm, "cupy" if arrays.gpus() else "numpy")
    lengths = args.tokens or [2**10 if xp is np else 2**15]
    sizes, dtype = given(args, comm, lengths, xp is not np)
    asked = [chosen.on_grid(one, args, comm.Get_size()) for one in args.algorithms]
    on_root(comm, lambda: writing.check(args.json))
    from .torch_contenders import contenders, table
    from .torch_step import measure, tasks

    command, ranks = " ".join(["mpiattn", *sys.argv[1:]]), comm.Get_size()
    about = f"{sizes}, {dtype}{', recomputed' if args.recompute else ''}; medians of {args.rounds} rounds"
    surroundings, report = environment(comm, on_gpus=xp is not np), []

    def build(one: Asked) -> Attention:
        name, arguments = one
        return ALGORITHMS[name](comm, mask=Causal(), **gpu.options(args), **arguments)

    def say(*lines: str) -> None:
        if comm.Get_rank() == 0:
            print(*lines, sep="\n", flush=True)

    say(f"command: {command}", "machine:", *(f"  {line}" for line in describe(comm, xp)))
    for task in tasks(comm, xp, sizes, dtype, lengths, args.recompute):
        what = comm, task.model, task.tokens, task.ids.device
        entered = contenders(*what, asked, build, with_torch=xp is not np and not args.no_torch)
        progress = bar(comm, args.rounds * len(entered), "turn")
        for _, contender in itertools.product(range(args.rounds), entered):
            progress.set_postfix_str(f"{contender.name}, {task.tokens} tokens")
            measure(task, contender)
            progress.update()
        progress.close()
        say("", f"ranks {ranks}, tokens {task.tokens}, {about}", table(entered, task.tokens / ranks))
        report += [{"tokens": task.tokens, **contender.result} for contender in entered]
        document = {"command": command, "environment": surroundings, "ranks": ranks, **vars(sizes), "dtype": dtype}
        document |= {"recompute": args.recompute, "results": report}
        if args.json:  # after each number of tokens: the next may need more memory than there is
            on_root(comm, partial(writing.write_json, args.json, document))
    return 0


def given(args: argparse.Namespace, comm: Communicator, lengths: Sequence[int], on_gpu: bool) -> tuple[Sizes, str]:
    """Return the model's sizes and the name of its dtype.

    Raises
    ------
    InputError
        On every rank, where something does not fit, or torch is missing on one.
    """
    for rank, reason in enumerate(comm.allgather(torch_missing(on_gpu))):
        if reason:
            raise InputError(f"on rank {rank}, {reason}")
    from ...torch.checks import check
    from .torch_llama import Sizes

    if args.no_torch and not on_gpu:
        raise InputError("--no-torch does nothing on CPUs, for which torch's context parallelism has no attention")
    multiple = 2 * comm.Get_size()
    for tokens in lengths:
        if tokens % multiple and multiple > 2 and on_gpu and not args.no_torch:
            raise InputError(f"--tokens {tokens}: torch shares out multiples of {multiple}; --no-torch does without it")
    numbers = {name: getattr(args, name) or default for name, default in (ON_GPUS if on_gpu else ON_CPUS).items()}
    sizes = Sizes(**numbers, kv_heads=args.kv_heads or numbers["heads"])
    if sizes.hidden % (2 * sizes.heads):
        text = "rotary embeddings turn pairs"
        raise InputError(f"--hidden {sizes.hidden} must be a multiple of 2 x --heads {sizes.heads}: {text}")
    if sizes.heads % sizes.kv_heads:
        raise InputError(f"--heads {sizes.heads} must be a multiple of --kv-heads {sizes.kv_heads}")
    try:
        for name, _ in args.algorithms:
            check(name, 1, comm.Get_size())
        return sizes, arrays.dtype(args.dtype or ("bfloat16" if on_gpu else "float32")).name
    except ValueError as error:
        raise InputError(str(error)) from None


def torch_missing(on_gpu: bool) -> str:
    """Return what torch lacks on this rank, or nothing."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'mpiattn[torch]'"
    import torch

    return "torch finds no GPU" if on_gpu and not torch.cuda.is_available() else ""


def whole(text: str) -> int:
    """Read a number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)
