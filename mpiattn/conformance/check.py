"""The check of one case: values, gradients, and every byte that is received."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from ..costs.traffic import Costs
from ..messages.message import Communicator
from .case import Case
from .meeting import meet
from .player import Factory, Player, Received, Refused
from .turn import Turn


def check(
    factory: Factory | Player,
    comm: Communicator,
    case: Case,
    traffic: Callable[..., Costs] | None = None,
    xp: ModuleType = np,
) -> Received:
    """Return what this rank received; raise AssertionError, on every rank alike, where a rank is wrong, or Refused.

    Parameters
    ----------
    factory : called with a communicator and `Case.options`, or Player
    comm : mpi4py.MPI.Comm
    case : Case
    traffic : called with the problem and the rank, optional
        Returns what the rank should receive.
    xp : module
        Whose arrays: NumPy's, or CuPy's on a GPU.
    """
    player = factory if isinstance(factory, Player) else Player(factory, traffic)
    if not player.foreign:
        turn = Turn(player, comm, case, xp)
        turn.play()
        wrong = turn.judge()
    else:
        over = comm.Split(0, comm.Get_rank())  # what a turn leaves under way meets no other case
        turn, wrong, error = Turn(player, over, case, xp), [], None
        try:
            turn.play()
        except Exception as raised:
            error = raised
        outcomes = meet(comm, error, player.patience)
        if all(isinstance(outcome, Refused) for outcome in outcomes):
            over.Free()
            raise next(outcome for outcome in outcomes if isinstance(outcome, Refused))
        if any(outcomes):
            mine = outcomes[comm.Get_rank()]
            wrong = [f"refused what other ranks did not: {mine}" if isinstance(mine, Refused) else mine] if mine else []
        else:
            wrong = turn.judge()
            over.Free()
    reports = [f"rank {rank}: {text}" for rank, texts in enumerate(comm.allgather(wrong)) for text in texts]
    if reports:
        raise AssertionError(f"{case}\n" + "\n".join(reports))
    return turn.received
