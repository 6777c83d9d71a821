"""What comes before the first message: the ranks agree, choose a kernel, and plan."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import arrays, kernels
from ..arrays import Array
from ..errors import InputError
from ..kernels.numpy.kernel import NumpyKernel
from ..messages.device.channel import check_mode
from ..messages.message import Communicator
from ..problems import layout as layouts
from ..problems.dropout import Dropout
from ..problems.mask import Mask
from ..problems.problem import Problem
from ..problems.user_mask import held
from ..trace.kernel import TracedKernel
from .agreement import described, posed, settled, show
from .attach import attach
from .given import Given, agreed_given, drawn, numbered
from .options import Check, agree, alike, as_float, check_mask, check_partials, check_scale, check_softcap
from .storage import Storage

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of `forward`: this rank's share of everything, nothing that grows with n.

    `out` and `lse` belong to the queries that `forward` was given; `lse` is the natural logarithm of the sum of
    exponentials of each query's scores, its sink included, float64, (batch, heads, tokens), -inf where there are none.
    q, k, v are what this rank computed with: its tokens, or where heads are exchanged, its heads.
    """

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array
    problem: Problem
    sinks: Array | None = None
    dropout: Dropout | None = None
    by: tuple[object, ...] = ()
    """Of the attention that gives it: `Prepared.identity`."""


class Prepared(Storage):
    """An algorithm that is built, and gets ready for each call; its parameters are those of `base.Attention`."""

    final = True
    """Whether what it computes is the result, and not a part of another algorithm's sums."""

    def __init__(
        self,
        comm: Communicator,
        *own: Check,
        layout: str | None = None,
        mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        partials: str = "wide",
        kernel: str | None = None,
        gpu_messages: str = "auto",
    ) -> None:
        super().__init__()
        self.mask = held(mask)
        self.layout = layout or layouts.default(self.mask)
        self.comm = comm
        self.scale, self.softcap, self.partials = as_float(scale), as_float(softcap), partials
        self.kernel_name, self.gpu_messages = kernel, gpu_messages
        self.sinks: Array | None = None
        self.dropout: Dropout | None = None
        self.first_head = 0
        """Number, among all, of the first query head that this rank computes."""
        agree(
            comm,
            partial(check_mask, self.mask),
            partial(layouts.check, self.layout, comm.Get_size()),
            partial(kernels.check, kernel),
            partial(check_mode, gpu_messages),
            partial(check_scale, scale),
            partial(check_softcap, softcap),
            partial(check_partials, partials),
            partial(alike, type(self).__name__),
            *own,
        )
        self.kernel: Any = NumpyKernel(self.mask, self.scale, self.softcap)

    def agree_forward(self, q: object, k: object, v: object, **given: Unpack[Given]) -> Problem:
        """Agree with all ranks on the problem that the arrays pose, and plan for it."""
        table = self._gather(q, k, v, numbers=numbered(q, **given))
        descriptions, others = np.split(table, [3 * arrays.DESCRIPTION], axis=1)
        problem = posed(descriptions.tobytes(), self.comm.Get_size(), self.layout, self.mask, self.partials)
        return self.accept(others, problem, q, **given)

    def accept(
        self, table: NDArray[np.int64], problem: Problem, like: object, sinks: Array | None = None,
        dropout: Dropout | None = None,
    ) -> Problem:  # fmt: skip
        """Agree with all ranks on what they are given beside q, k, v, and plan for the problem."""
        agreed_given(table.tolist(), alike=self.layout != layouts.EVERYWHERE)
        self.sinks = sinks
        problem = settled(self.comm, problem, self.problem)
        return self.prepare(problem, like, dropout if dropout and dropout.rate else None)

    def agree_backward(self, d_out: object, saved: Saved) -> Problem:
        """Agree with all ranks on the gradient that arrived, and on the problem it belongs to."""
        own = isinstance(saved, Saved) and saved.by == self.identity
        saves = (saved.problem.sizes, saved.sinks is not None, drawn(saved.dropout)) if own else None
        numbers = own, zlib.crc32(repr(saves).encode())
        table = self._gather(saved.out if own else None, d_out, numbers=numbers)
        specs = described(table.tobytes(), self.comm.Get_size(), 2)
        if not own:
            raise InputError("saved is not what forward of this algorithm returns with the same options")
        problem = saved.problem
        for rank, (out, gradient) in enumerate(specs):
            if gradient != out:
                raise InputError(f"d_out on rank {rank} is {show(gradient)}, but out is {show(out)}")
        return self.prepare(problem, saved.q, saved.dropout)

    @property
    def identity(self) -> tuple[object, ...]:
        """What must be the same of the attention that saves and the one that goes back."""
        return type(self).__name__, self.layout, self.mask, self.scale, self.softcap

    def _gather(self, *values: object, numbers: Sequence[int] = ()) -> NDArray[np.int64]:
        """Return the descriptions of every array of every rank, and behind them its numbers: a row for each rank."""
        own = np.concatenate([*map(arrays.describe, values), np.array(numbers, np.int64)])
        everything = np.empty((self.comm.Get_size(), len(own)), np.int64)
        self.comm.Allgather(own, everything)
        return everything

    def prepare(self, problem: Problem, like: Any, dropout: Dropout | None = None) -> Problem:
        """Plan for a problem of arrays like this one, unless it is the last one."""
        xp = arrays.namespace(like)
        same = problem == self.problem and xp is self.xp
        if not same or (dropout is None) != (self.dropout is None):
            self.choose(problem, xp, dropout)
        if not same:
            self.replan(problem, xp)
        if dropout is not None or self.dropout is not None:
            self.kernel.drop(dropout, self.first_head)
        self.dropout = dropout
        assert self.problem is not None
        return self.problem

    def choose(self, problem: Problem, xp: Any, dropout: Dropout | None) -> None:
        """Choose the kernel for a problem of arrays of that namespace."""
        if self.problem is None or xp is not np or xp is not self.xp or problem.mask != self.problem.mask:
            options = problem.mask, self.scale, self.kernel_name, self.softcap, dropout
            kernel = kernels.choose(xp.__name__, problem, *options)
            kernel.rounds = self.final
            if isinstance(self.kernel, TracedKernel):
                self.kernel.kernel = kernel
            else:
                self.kernel = kernel

    def replan(self, problem: Problem, xp: Any) -> None:
        """Plan for a problem of arrays of that namespace."""
        if xp.__name__ == "cupy":
            attach(self, xp, self.gpu_messages)
        self.xp = xp
        self.storage.clear()
        self.made.clear()
        self.plan(problem)
        self.problem = problem

    def plan(self, problem: Problem) -> None:
        """Make what depends on the problem only: called when it differs from the last one."""
        raise NotImplementedError
