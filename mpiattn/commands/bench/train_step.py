"""A step of training, with random weights and tokens: measured on the ranks, and predicted by virtual ones."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from ...algorithms.spelling import Asked
from ...machines.machine import Machine
from ...messages.message import Communicator
from ...models.plan import BYTES, Plan
from ...models.training import Trainer
from ...trace.comm import TracedComm
from ...virtual import VirtualComm, run


class TrainStep:
    """The steps of one trainer, and how long they took; all ranks of a communicator start each together.

    Parameters
    ----------
    name : str
        For the table.
    comm : mpi4py.MPI.Comm
    over : mpi4py.MPI.Comm
        The ranks that train together: all of `comm`, or one.
    plan : Plan
    asked : Asked
        The algorithm, and its arguments.

    Attributes
    ----------
    seconds : list of float
        Of each step, on the slowest rank.
    waiting : list of float
        Share of a step in which a rank waits for messages, the mean of the ranks.
    others : list of float
        Seconds of a step outside of attention's blocks, on the slowest rank.
    losses : list of float
    """

    def __init__(self, name: str, comm: Communicator, over: Communicator, plan: Plan, asked: Asked) -> None:
        self.name, self.comm, self.traced = name, comm, TracedComm(over)
        self.trainer = trainer(self.traced, plan, asked)
        self.tokens = plan.batch * plan.tokens / over.Get_size()
        self.seconds: list[float] = []
        self.waiting: list[float] = []
        self.others: list[float] = []
        self.losses: list[float] = []

    def measure(self, keep: bool) -> None:
        """Train for a step, and keep its times, or not."""
        trace = self.traced.trace
        trace.clear()
        self.comm.Barrier()
        start = time.perf_counter()
        loss = self.trainer.train()
        seconds = time.perf_counter() - start
        waited = trace.waited() + trace.spent("agree")
        ranks = np.array(self.comm.allgather((seconds, waited / seconds, seconds - trace.spent("compute"))))
        if keep:
            self.seconds.append(float(ranks[:, 0].max()))
            self.waiting.append(float(ranks[:, 1].mean()))
            self.others.append(float(ranks[:, 2].max()))
            self.losses.append(loss)

    def results(self) -> dict[str, Any]:
        """Return what was measured, and the tokens a second of a rank in a median step."""
        columns = {name: getattr(self, name) for name in ("seconds", "waiting", "others", "losses")}
        return {"name": self.name, "rate": self.tokens / statistics.median(self.seconds), **columns}


def trainer(comm: Any, plan: Plan, asked: Asked) -> Trainer:
    """Return a trainer on random tokens, the same on every rank."""
    name, arguments = asked
    text = np.random.default_rng(plan.seed).integers(0, BYTES, 2 * plan.tokens, np.uint8).tobytes()
    return Trainer(comm, plan, text, name, **arguments)


def predict(machine: Machine, ranks: int, plan: Plan, asked: Asked) -> float:
    """Return the seconds that messages and attention's blocks take in a step on a virtual cluster.

    The trainer itself runs on the virtual ranks, with all its arrays: the messages are those of training, the sum of
    the gradients and the ranks' agreement on their input among them. What no machine description tells, the other
    layers, the loss and the optimiser, takes no virtual time: `TrainStep.others` of a rank that trains alone on as
    many tokens. No message of a step travels meanwhile, so the two add up. Copies and sums of arrays with data take
    no virtual time either.
    """

    def second_step(comm: VirtualComm) -> float:
        trains = trainer(comm, plan, asked)
        trains.train()  # in the first step the ranks agree on more
        comm.Barrier()
        start = comm.me.clock
        trains.train()
        return comm.me.clock - start

    return max(run(ranks, machine, second_step))
