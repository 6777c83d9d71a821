"""Train a small Llama on the bytes of a text, its sequences spread over the ranks.

The loss is the same on any number of ranks and with every algorithm. Checkpoints are Hugging Face folders that
`mpiattn generate --model` takes too; a run that was killed goes on from its last complete one with --resume, on any
number of ranks, and on the same number as if nothing had happened. With --elastic it goes on by itself with the ranks
that are left when one dies: mpiexec --with-ft ulfm -n 4 mpiattn train --elastic ..., with Open MPI 5.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from ...algorithms.sharing import SHARE_TOKENS
from ...algorithms.spelling import Asked
from ...errors import InputError
from ...machines import writing
from ...machines.reading import check_memory, content
from ...messages.message import Communicator
from ...models import checkpoint
from ...models.plan import Plan
from ...models.training import Trainer
from ...problems.layout import LAYOUTS
from ...trace.comm import TracedComm
from .. import charts, chosen, gpu
from ..root import on_root, patiently
from . import elastic
from .figure import draw
from .report import Losses, judged, progress, save, say

T = TypeVar("T")

CURVE = "losses.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn train`."""
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="to train on; a token is a byte of it")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help=".toml: [model] and [training]")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for checkpoints and the curve of losses")
    parser.add_argument("--every", type=int, default=50, metavar="N", help="steps between checkpoints (default 50)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the folder, if any")
    parser.add_argument(
        "--elastic", action="store_true",
        help="go on with the ranks that are left when one dies; needs Open MPI 5, started with mpiexec --with-ft ulfm",
    )  # fmt: skip
    parser.add_argument(
        "--algorithm", type=one, default="mesh", metavar="NAME",
        help=f"of those that share out tokens (default mesh); {chosen.SPELLING}",
    )  # fmt: skip
    parser.add_argument("--layout", choices=LAYOUTS, help="of the tokens of a sequence (default zigzag)")
    parser.add_argument(
        "--data", type=int, default=1, metavar="N", help="groups of ranks that train on different sequences (default 1)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve of losses")
    gpu.add_arguments(parser)


def one(text: str) -> Asked:
    """Read an algorithm that shares out tokens from the command line."""
    return chosen.one(text, SHARE_TOKENS)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Train, print a line now and then, and write checkpoints."""
    if args.elastic:
        elastic.check(args, comm)
    plan, text = comm.bcast(on_root(comm, lambda: given(args)))
    on_root(comm, lambda: charts.check(args.plot) if args.plot else None)
    xp = gpu.namespace(args, comm)
    name, arguments = args.algorithm
    traced = TracedComm(comm)
    options = {"layout": args.layout, **gpu.options(args), **arguments}
    trainer = Trainer(elastic.surviving(traced) if args.elastic else traced, plan, text, name, args.data, xp, **options)
    losses: Losses = {"train": [], "validation": [], "unigram": trainer.unigram()}
    if args.resume:
        path = comm.bcast(on_root(comm, lambda: last(args.output)))
        if path is not None:
            # A checkpoint without its text's checksum may be of another text than is trained on now.
            losses = together(comm, path, trainer) | {"unigram": losses["unigram"]}
            more = "" if trainer.step < plan.steps else "; to go on, give [training] more steps"
            say(trainer, f"resumed from {path}: {min(trainer.step, plan.steps)} of {plan.steps} steps are done{more}")
            for change in checkpoint.retuned(path, plan):
                say(trainer, f"from here on {change}")
    step, commit = elastic.begin(trainer, traced, losses) if args.elastic else (trainer.train, call)
    traced.trace.clear()
    since = time.perf_counter(), trainer.step
    while trainer.step < plan.steps:
        losses["train"].append(step())
        done = trainer.step
        if done % args.every == 0 or done == plan.steps:
            seconds, steps = time.perf_counter() - since[0], done - since[1]
            waited = (traced.trace.waited() + traced.trace.spent("agree")) / seconds
            validation, waits = commit(partial(judged, trainer, waited))
            losses["validation"].append([done, validation])
            progress(trainer, losses, steps * plan.batch * plan.tokens / seconds, waits)
            if args.output:
                commit(partial(save, trainer, args.output, losses))
            traced.trace.clear()
            since = time.perf_counter(), done
    if args.output:
        commit(lambda: patiently(trainer.comm, lambda: writing.write_json(args.output / CURVE, losses)))
    if args.plot:
        commit(lambda: patiently(trainer.comm, lambda: draw(losses, args.plot)))
    trainer.free()
    return 0


def call(work: Callable[[], T]) -> T:
    """Return what `work` returns: the end of a rank is that of the job."""
    return work()


def given(args: argparse.Namespace) -> tuple[Plan, bytes]:
    """Return the plan and the text, once it is known that what comes of them can be written."""
    if args.every < 1:
        raise InputError(f"--every {args.every}: at least 1")
    if args.output and args.output.exists() and not args.output.is_dir():
        raise InputError(f"{args.output}: is a file, not a folder")
    if args.resume and args.output is None:
        raise InputError("--resume goes with --output, the folder of the checkpoints")
    plan = Plan.from_toml(args.config)
    numbers = 4 * sum(map(math.prod, plan.model.shapes.values()))  # weights, gradients, AdamW's two means
    check_memory(4 * numbers, f"{args.config}: to train this model")
    text = content(args.text)
    if args.output:
        if checkpoint.complete(args.output) and not args.resume:
            raise InputError(f"{args.output} has checkpoints: go on with --resume, or name another folder")
        args.output.mkdir(parents=True, exist_ok=True)
        writing.check(args.output / CURVE)
    return plan, text


def last(folder: Path) -> Path | None:
    """Return the last complete checkpoint of a folder; None where there is none."""
    found = checkpoint.complete(folder)
    return found[-1] if found else None


def together(comm: Communicator, path: Path, trainer: Trainer) -> Losses:
    """Set the trainers of all ranks to a checkpoint; what one finds wrong is raised on every rank."""
    losses, wrong = {}, None
    try:
        losses = checkpoint.resume(path, trainer)
        if not all(isinstance(losses.get(name), list) for name in ("train", "validation")):
            raise InputError(f"{path} is damaged: it has no curve of losses")
    except InputError as error:
        wrong = str(error)
    for message in comm.allgather(wrong):
        if message is not None:
            raise InputError(message)
    return losses
