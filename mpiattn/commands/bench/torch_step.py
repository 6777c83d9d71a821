"""A training step of a model in torch, over the ranks: attention of this package, or torch's context parallelism."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ...messages.message import Communicator, Testall
from .. import gpu
from .torch_contenders import Contender
from .torch_llama import Llama, Sizes
from .torch_shares import Share

PATIENCE = 60.0
"""Seconds after which a rank that ran out of memory no longer waits for the others to come out of their step."""


@dataclass
class Task:
    """A model to train, the same on every rank, on a sequence of which all ranks have all tokens.

    Attributes
    ----------
    meeting : mpi4py.MPI.Comm
        Of all ranks, for `meet` alone: a rank that is there meets no collective of one that is still in its step.
    ids : int64, (tokens + 1,)
        Numbers of the words; the last one is only a target.
    """

    comm: Communicator
    meeting: Communicator
    xp: ModuleType
    model: Llama
    optimizer: torch.optim.Optimizer
    ids: Tensor
    recompute: bool

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return len(self.ids) - 1

    def passes(self, share: Share) -> Tensor:
        """Go forward and backward; return this rank's part of the mean loss."""
        self.optimizer.zero_grad()
        ids, targets = self.ids[share.positions], self.ids[share.positions + 1]
        total: Tensor = self.model(ids, targets, share.positions, share.attend, self.recompute)
        loss = total / self.tokens
        loss.backward()
        return loss.detach()

    def timed(self, *works: Callable[[], object]) -> list[float]:
        """Return the seconds of one thing after the other, each until the device is done; all ranks start together."""
        gpu.wait(self.xp)
        self.comm.Barrier()
        marks = [time.perf_counter()]
        for work in works:
            work()
            gpu.wait(self.xp)
            marks.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(marks)]

    def turn(self, contender: Contender) -> dict[str, float]:
        """Let a contender make two steps, of which the second is timed, and one pass without messages.

        Returns
        -------
        dict
            What `Contender.rounds` says, of this rank alone.
        """
        with contender.share() as share:
            loss: list[Tensor] = []
            works = lambda: loss.append(self.passes(share)), share.sum_gradients, self.optimizer.step
            self.timed(*works)  # allocates, and chooses kernels
            passes, gradients, update = self.timed(*works)
            own = {"seconds": passes + gradients + update, "passes": passes, "quiet": 0.0, "gradients": gradients}
            own |= {"nbytes": self.used(), "loss": float(loss[-1])}
            if share.silence is not None and self.comm.Get_size() > 1:
                share.silence()
                own["quiet"] = sum(self.timed(lambda: self.passes(share)))
        return own

    def used(self) -> int:
        """Return the bytes that are in use on this rank's GPU; 0 on a CPU."""
        if self.xp is np:
            return 0
        free, total = self.xp.cuda.runtime.memGetInfo()
        return int(total - free)

    def give_back(self) -> None:
        """Give back to the GPU what a contender has left, so that it is not counted as the next one's."""
        self.optimizer.zero_grad()
        if self.xp is not np:
            gc.collect()
            self.xp.get_default_memory_pool().free_all_blocks()
            torch.cuda.empty_cache()


def measure(task: Task, contender: Contender, patience: float = PATIENCE) -> None:
    """Let a contender take its turn, unless it has failed; out of memory on one rank, all give it up."""
    if contender.failed:
        return
    own: dict[str, float] = {}
    wrong = ""
    task.give_back()
    try:
        own = task.turn(contender)
    except (RuntimeError, MemoryError, ValueError) as error:
        signs = "out of memory", "alloc_failed"  # CUDA's and CuPy's words, and cuBLAS's and cuDNN's
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in signs):
            raise
        wrong = f"{type(error).__name__}: {error}"
        meet(task.meeting, error, patience)
    else:
        meet(task.meeting)
    table = task.comm.allgather((wrong, own))
    contender.failed = next((f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(table) if reason), "")
    if not contender.failed:
        rows = [row for _, row in table]
        slowest = {name: max(row[name] for row in rows) for name in own}
        contender.rounds.append({**slowest, "loss": sum(row["loss"] for row in rows)})


def meet(comm: Communicator, error: Exception | None = None, patience: float = PATIENCE) -> None:
    """Wait for all ranks; where an error kept this one from its step, raise it if they don't come.

    Ranks do the same things, so memory mostly ends on all of them at the same one. Where it ends on some, the others
    wait for their messages for ever.
    """
    there, since = comm.Ibarrier(), time.monotonic()
    while not Testall([there]):
        if error is not None and time.monotonic() - since > patience:
            raise error
        time.sleep(0.001)


def tasks(
    comm: Communicator, xp: ModuleType, sizes: Sizes, dtype: str, lengths: Sequence[int], recompute: bool
) -> Iterator[Task]:
    """Yield the training of one model on sequences of several lengths, one after the other."""
    device = torch.device("cpu") if xp is np else torch.device("cuda", xp.cuda.Device().id)
    if xp is not np:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # on all ranks: the same weights and the same tokens
    model = Llama(sizes, device, getattr(torch, dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meeting = comm.Split()
    for tokens in lengths:
        ids = torch.randint(sizes.vocabulary, (tokens + 1,), device=device)
        yield Task(comm, meeting, xp, model, optimizer, ids, recompute)
    meeting.Free()
