"""Training that goes on when a rank dies, by MPI's fault tolerance (User-Level Failure Mitigation).

    work               what all ranks do together, such as a step up to its gradients: it changes no weights
    Agree              has every rank done it, and are all of them there?
      yes              the weights are updated, by each rank for itself, and the next work begins
      no  Revoke       nobody waits any longer for a message that will not come
          Shrink       a communicator of the ranks that are left
          the grid     is made anew of them, and the attention on it, each followed by Agree
          work         again, by the ranks that are left

A communicator that MPI makes of another one is not revoked with it, so each is: those of a `Trainer` are all made of
one private duplicate, which revokes them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from mpi4py import MPI

from ..errors import InputError, WriteError
from ..messages.surviving import SurvivingComm
from ..trace.comm import TracedComm
from .training import Trainer

T = TypeVar("T")

Death = dict[str, Any]  # what JSON can hold

ENABLED = "OMPI_MCA_mpi_ft_enable"
"""A setting that Open MPI's launcher gives the ranks with --with-ft ulfm, without which MPI ends the job."""

START = "Open MPI 5, started by: mpiexec --with-ft ulfm -n 4 mpiattn train --elastic ..."


class RankLost(Exception):
    """A work that not all ranks have done: at least one of them is gone."""


class Elastic:
    """The ranks that are left of a communicator, and what they train.

    Parameters
    ----------
    traced : TracedComm
        Of a communicator that nothing else uses any more: it is revoked when a rank dies.
    trainer : Trainer
        Built on `SurvivingComm(traced)`.
    tell : function
        Called on every rank with a sentence about what has happened.

    Attributes
    ----------
    deaths : list of dict
        What JSON can hold: the step in which ranks were lost, their numbers at the start, how many are left and in how
        many groups of sequences (data); seconds from when it was noticed to the end of the next step, and that moment.
    """

    def __init__(self, traced: TracedComm, trainer: Trainer, tell: Callable[[str], None]) -> None:
        self.comm: MPI.Intracomm = traced.comm
        self.trace, self.trainer, self.tell = traced.trace, trainer, tell
        self.first, self.data = self.comm.Get_group(), trainer.data
        self.deaths: list[Death] = []
        self.noticed: list[float] = []
        self.interrupted: list[MPI.Exception] = []
        """With their frames, and so with the memory of messages that may still be under way."""

    def step(self) -> float:
        """Do the next step, as `Trainer.train`."""
        loss, gradients = self.commit(partial(self.trainer.gradients, self.trainer.step))
        self.trainer.update(gradients)
        for death, noticed in zip(self.deaths[-len(self.noticed) :], self.noticed, strict=False):
            death["seconds"], death["time"] = round(time.perf_counter() - noticed, 3), time.time()
        if self.noticed:
            self.tell(f"step {self.trainer.step} done {self.deaths[-1]['seconds']:.2f} s after the death was noticed")
        self.noticed.clear()
        return loss

    def commit(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, once all ranks that are left have done it; it may be called several times."""
        while True:
            try:
                return self.attempt(work)
            except RankLost:
                self.go_on(time.perf_counter())

    def attempt(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise RankLost on every rank; what else it raises is the same on all."""
        result, error = None, None
        try:
            result = work()
        except (MPI.Exception, InputError, WriteError) as raised:
            error = raised
        done = not isinstance(error, MPI.Exception)
        if isinstance(error, MPI.Exception):
            self.interrupted.append(error)
            self.revoke()
        try:
            done = bool(self.comm.Agree(int(done)))  # works on a revoked communicator, too
        except MPI.Exception:  # the same on every rank: one is gone, if not in this work
            done = False
        if not done:
            raise RankLost from error
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def revoke(self) -> None:
        """End the waiting of all ranks on all communicators of the training."""
        self.trainer.own.Revoke()
        self.comm.Revoke()

    def go_on(self, noticed: float) -> None:
        """Make a new grid of the ranks that are left."""
        gone: list[int] = []
        self.trace.events[:] = [event for event in self.trace.events if event.end == event.end]  # those that ended
        data = self.trainer.data
        while True:
            before = self.comm
            self.revoke()
            self.comm = cast(MPI.Intracomm, before.Shrink())
            death = self.note(before, noticed)
            gone += death["ranks"]
            try:
                comm = SurvivingComm(TracedComm(self.comm, self.trace))
                self.attempt(partial(self.trainer.arrange, comm, death["data"]))
                self.attempt(self.trainer.build)
            except RankLost:
                noticed = time.perf_counter()
            else:
                groups = f", --data {self.trainer.data} instead of {data}" if self.trainer.data != data else ""
                ranks = ", ".join(map(str, gone))
                self.tell(f"lost in step {death['step']}: rank {ranks}; {death['left']} go on{groups}")
                return

    def note(self, before: MPI.Intracomm, noticed: float) -> Death:
        """Put down which ranks are gone."""
        gone = MPI.Group.Difference(before.Get_group(), self.comm.Get_group())
        if not gone.size:
            raise self.interrupted[-1] if self.interrupted else RuntimeError("a rank failed, and none is gone")
        ranks, left, step = gone.Translate_ranks(range(gone.size), self.first), self.comm.size, self.trainer.step + 1
        data = max(d for d in range(1, self.data + 1) if left % d == 0 and self.trainer.plan.batch % d == 0)
        death = {"step": step, "ranks": ranks, "left": left, "data": data, "seconds": None, "time": None}
        self.deaths.append(death)
        self.noticed.append(noticed)
        return death


def check() -> None:
    """Raise InputError where MPI ends the job when a rank dies."""
    if os.environ.get(ENABLED, "0") not in ("1", "true"):
        library, version = MPI.get_vendor()
        here = f"{library} {'.'.join(map(str, version))}"
        raise InputError(f"--elastic needs MPI that outlives a rank, which {here} does not here: {START}")
