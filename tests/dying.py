"""`mpiattn train` whose ranks kill themselves: `python tests/dying.py ARGUMENTS`, on 4 ranks.

Rank 1 dies when a ring begins: rank 2 learns of it, and rank 3 waits for what rank 2 would have handed on. Rank 2 dies
where the others are about to go on without rank 1. Rank 0 dies when it has the gradients of a step, before Agree.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from mpi4py import MPI

from mpiattn.algorithms.ring import RingAttention
from mpiattn.commands.cli import main
from mpiattn.models.training import Trainer


def die_in(kind: Any, method: str, call: int, rank: int, after: bool = False) -> None:
    """Let a rank die in a call of a method, counted from 1: before what it does, or after it."""
    inner = getattr(kind, method)
    calls: list[None] = []

    def counted(*arguments: object) -> Any:
        calls.append(None)
        dies = len(calls) == call and MPI.COMM_WORLD.Get_rank() == rank
        result = None if dies and not after else inner(*arguments)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, method, counted)


die_in(RingAttention, "pass_kv", 10, rank=1)
die_in(Trainer, "build", 2, rank=2)
die_in(Trainer, "added_up", 5, rank=0, after=True)
sys.exit(main())
