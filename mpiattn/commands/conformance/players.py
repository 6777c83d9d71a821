"""The implementations that are asked for: algorithms of this package, or somebody's factory."""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
from functools import partial
from typing import Any

from ...algorithms import ALGORITHMS
from ...algorithms.spelling import spell, variants
from ...conformance.player import Player
from ...costs import COSTS
from ...errors import InputError
from ...messages.hosts import hosts
from ...messages.message import Communicator, virtual_time
from .. import chosen, gpu


def find(args: argparse.Namespace, comm: Communicator) -> list[tuple[str, Player]]:
    """Return each implementation that is asked for, and its name."""
    given = {key: value for key, value in gpu.options(args).items() if value not in (None, "auto")}
    if args.module:
        return [(args.module, foreign(args, comm, given))]
    found = []
    for name, arguments in chosen.expand(args, comm.Get_size())[0]:
        formula = partial(COSTS[name], **arguments)
        player = Player(partial(ALGORITHMS[name], **arguments, **given), formula, backward=not args.forward_only)
        found.append((spell(name, arguments), player))
    return found


def foreign(args: argparse.Namespace, comm: Communicator, given: dict[str, Any]) -> Player:
    """Return the implementation of `--module`."""
    if args.results_only:
        introduce(comm)
    if os.getcwd() not in sys.path:  # a script's own folder is there, that in which it is called is not
        sys.path.insert(0, os.getcwd())
    module, colon, name = args.module.partition(":")
    if not (module and colon and name) or "/" in module or module.startswith("."):
        raise InputError(f"--module {args.module}: say MODULE:FACTORY, such as foreign_ring:attention")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--module {args.module}: {error}") from None
    return Player(
        partial(factory, **given) if given else factory,
        formula(args, comm) if args.formula else None,
        foreign=True,
        communicator=not args.results_only,
        backward=not args.forward_only,
        patience=min(args.patience, Player.patience),
    )


def formula(args: argparse.Namespace, comm: Communicator) -> Any:
    """Return the formula of `--formula`, of the one variant of an algorithm."""
    name, arguments = args.formula
    fitting = variants(name, arguments, comm.Get_size())
    if len(fitting) != 1:
        choices = ", ".join(repr(spell(name, one)) for one in variants(name, {}, comm.Get_size()))
        raise InputError(f"--formula {spell(name, arguments)} on {comm.Get_size()} ranks: choose from {choices}")
    return partial(COSTS[name], **fitting[0])


def introduce(comm: Communicator) -> None:
    """Set what torchrun sets, so that the ranks find each other without MPI, unless the launcher has."""
    if virtual_time() is not None:
        raise InputError("--results-only takes processes: virtual ranks are in one")
    together = hosts(comm)[comm.Get_rank()]
    several = len(together) < comm.Get_size()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = comm.bcast(probe.getsockname()[1])
    host = comm.bcast(socket.gethostname() if several else "127.0.0.1")
    for variable, value in {
        "RANK": comm.Get_rank(),
        "WORLD_SIZE": comm.Get_size(),
        "LOCAL_RANK": together.index(comm.Get_rank()),
        "LOCAL_WORLD_SIZE": len(together),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }.items():
        os.environ.setdefault(variable, str(value))
