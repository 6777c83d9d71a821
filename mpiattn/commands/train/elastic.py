"""--elastic: what it does not go with, and its beginning."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from ... import kernels
from ...errors import InputError
from ...messages.message import Communicator
from ...models.training import Trainer
from ...trace.comm import TracedComm
from .. import chosen
from ..root import on_root
from .report import Losses, say

Commit = Callable[[Callable[[], Any]], Any]
"""Calls a function, and returns what it returned."""


def check(args: argparse.Namespace, comm: Communicator) -> None:
    """Raise InputError on every rank where training would not go on when a rank dies."""
    name, arguments = args.algorithm
    if of_ranks := ", ".join(sorted(arguments.keys() & set(chosen.OF_RANKS))):
        raise InputError(f"--elastic chooses the grid anew when a rank dies: {name} without {of_ranks}")
    if name == "shared_ring":  # whose ranks wait for each other in memory, not in messages
        raise InputError("--elastic does not go with shared_ring: take another algorithm, such as ring")
    if args.arrays == "cupy" or args.kernel in kernels.KERNELS["cupy"]:
        raise InputError("--elastic is for CPUs: MPI's messages between GPUs have no fault tolerance")
    from ...models import elastic  # imports MPI

    on_root(comm, elastic.check)


def surviving(traced: TracedComm) -> Communicator:
    """Return the communicator to train on."""
    from ...messages.surviving import SurvivingComm

    return cast(Communicator, SurvivingComm(traced))


def begin(trainer: Trainer, traced: TracedComm, losses: Losses) -> tuple[Callable[[], float], Commit]:
    """Return what does a step, and what does other work of all ranks, with those that are left.

    The deaths are put down beside the losses.
    """
    from ...models.elastic import Elastic

    elastic = Elastic(traced, trainer, partial(say, trainer))
    elastic.deaths += losses.get("deaths", [])
    losses["deaths"] = elastic.deaths
    return elastic.step, elastic.commit
