"""What every algorithm shares: its signature, the agreement on its input, and its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from .. import arrays, device, kernels
from .. import layout as layouts
from ..arrays import Parcel
from ..dropout import Dropout
from ..kernels.numpy.kernel import NumpyKernel
from ..mask import Full, Mask, Positions
from ..message import Communicator, InputError
from ..problem import Problem
from ..softmax import LSE, delta, sink_gradient, with_sinks
from .agreement import (
    Check,
    agree,
    agreed_given,
    alike,
    check_partials,
    check_softcap,
    described,
    drawn,
    numbered,
    posed,
    show,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack

Array = NDArray[Any]


class Options(TypedDict, total=False):
    """What every algorithm's constructor takes; see `Attention`."""

    layout: str | None
    mask: Mask | None
    scale: float | None
    softcap: float | None
    partials: str
    kernel: str | None
    gpu_messages: str


class Given(TypedDict, total=False):
    """What `forward` takes beside q, k, v; see `Attention.forward`."""

    sinks: Array | None
    dropout: Dropout | None


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of `forward`: this rank's share of everything, nothing that grows with n.

    `out` and `lse` belong to the queries that `forward` was given; `lse` is the natural logarithm of the sum of
    exponentials of each query's scores, its sink included, (batch, heads, tokens), -inf where there are none.
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


class Attention:
    """Exact attention of a sequence that is spread over the ranks of a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All its ranks build and call the algorithm together.
    *own : functools.partial
        For subclasses: the checks of their own arguments; see `agree`.
    layout : {"contiguous", "zigzag", "striped"}, optional
        Which tokens each rank owns. By default zigzag with a causal mask, which balances it, else contiguous.
    mask : Mask
        Evaluated on global positions.
    scale : float, optional
        Of the scores; 1/sqrt(head_dim) by default.
    softcap : float, optional
        Scores become softcap * tanh(scores / softcap) before the mask (Gemma 2, arXiv 2408.00118).
    partials : {"wide", "narrow"}
        How partial sums (out, dQ, dK, dV) travel: as they are added up, in float32 or wider, or rounded to the dtype
        of q for each hop, which halves their bytes with float16 and bfloat16 and adds its rounding error. Where
        the MPI library adds them up (allgather, decode, tensor_parallel), they are always wide.
    kernel : {"numpy", "cupy", "cudnn"}, optional
        What computes a block. By default the fastest that can do the problem at hand.
    gpu_messages : {"auto", "device", "host"}
        Whether messages between GPUs are of device memory or go through the host's. By default the first,
        if the MPI library turns out to take it.

    Raises
    ------
    InputError
        A ValueError, on every rank alike, before any message of the algorithm, where arguments or arrays do not fit.

    Notes
    -----
    Arrays are (batch, heads, tokens, head_dim), float64, float32, float16 or bfloat16, and hold this
    rank's tokens.
    """

    final = True
    """Whether what it computes is the result, and not a part of another algorithm's sums."""

    copied: frozenset[str] = frozenset()
    """Which of "q", "k", "v", "out" are the same on every rank, as are their gradients; see `owned`."""

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
        self.mask = Full() if mask is None else mask
        self.layout = layout or ("zigzag" if self.mask.causal else "contiguous")
        self.comm = comm
        self.scale, self.softcap, self.partials = scale, softcap, partials
        self.kernel_name, self.gpu_messages = kernel, gpu_messages
        self.problem: Problem | None = None
        self.xp: Any = np
        """Namespace of the arrays at hand: NumPy, CuPy, ..."""
        self.storage: dict[str, list[NDArray[np.uint8]]] = {}
        self.uses: dict[str, list[arrays.Uses | None]] = {}
        self.made: dict[tuple[Any, ...], dict[int, Parcel]] = {}
        self.sinks: Array | None = None
        self.dropout: Dropout | None = None
        self.first_head = 0
        """Number, among all, of the first query head that this rank computes."""
        agree(
            comm,
            partial(layouts.check, self.layout, comm.Get_size()),
            partial(kernels.check, kernel),
            partial(device.check, gpu_messages),
            partial(check_softcap, softcap),
            partial(check_partials, partials),
            partial(alike, type(self).__name__, self.mask, scale),
            *own,
        )
        self.kernel: Any = NumpyKernel(self.mask, scale, softcap)

    def forward(self, q: Array, k: Array, v: Array, **given: Unpack[Given]) -> tuple[Array, Saved]:
        """Return this rank's rows of softmax(scale q k^T) v, and what `backward` needs.

        Parameters
        ----------
        q : (batch, heads, tokens, head_dim)
        k : (batch, kv_heads, key tokens, head_dim)
        v : (batch, kv_heads, key tokens, v_head_dim)
            This rank's tokens; heads is a multiple of kv_heads.
        sinks : float, (heads,), optional
            A logit for each head of q, the same on every rank, at which there is nothing to attend to: it takes
            its part of each query's softmax (Xiao et al. 2023, arXiv 2309.17453). See `sink_gradient`.
        dropout : Dropout, optional
            The same on every rank.

        Returns
        -------
        out : dtype of q, (batch, heads, tokens, v_head_dim)
        saved : Saved
            With `saved.lse`: (batch, heads, tokens), in the dtype of partial sums.
        """
        problem = self.agree_forward(q, k, v, **given)
        return self.finish(q, k, v, *self.attend(problem, q, k, v))

    def backward(self, d_out: Array, saved: Saved) -> tuple[Array, Array, Array]:
        """Return this rank's rows of dQ, dK, dV, in the dtype of q.

        Parameters
        ----------
        d_out : (batch, heads, tokens, v_head_dim)
            Gradient of this rank's rows of out.
        saved : Saved
            From `forward`.
        """
        problem = self.agree_backward(d_out, saved)
        row_delta = delta(d_out, saved.out)
        self.kernel.remember(row_delta, saved.out)
        d_q, d_k, d_v = self.gradients(problem, saved.q, saved.k, saved.v, d_out, saved.lse, row_delta)
        return self.rounded(d_q), self.rounded(d_k), self.rounded(d_v)

    def sink_gradient(self, d_out: Array, saved: Saved) -> Array:
        """Return the gradient of the sinks: (heads,), in the dtype of partial sums, complete on every rank.

        One all-reduce, where the queries are spread over ranks.

        Parameters
        ----------
        d_out, saved
            As in `backward`.
        """
        problem = self.agree_backward(d_out, saved)
        if saved.sinks is None:
            raise InputError("there are no sinks in what was saved: give some to forward")
        own = sink_gradient(saved.sinks, saved.lse, delta(d_out, saved.out))
        if not problem.q_spread:
            return own
        total: Array = self.xp.empty(own.shape, own.dtype)
        self.comm.Allreduce(own, total)
        return total

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Return the complete out and lse of this rank's queries, in the dtype of partial sums.

        The ranks have agreed on the problem, and planned for it.
        """
        raise NotImplementedError

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, row_delta: Array
    ) -> tuple[Array, Array, Array]:
        """Return this rank's rows of dQ, dK, dV, in the dtype of partial sums.

        Parameters
        ----------
        problem, q, k, v
            As in `attend`.
        d_out, lse, row_delta
            Of this rank's queries; row_delta is rowsum(d_out * out).
        """
        raise NotImplementedError

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return the arguments of this algorithm's own with which it can be built on that many ranks."""
        return [{}]

    def finish(self, q: Array, k: Array, v: Array, out: Array, lse: Array) -> tuple[Array, Saved]:
        """Return what `forward` returns, from the complete (out, lse) of this rank's queries."""
        assert self.problem is not None
        if self.sinks is not None:
            out, lse = with_sinks(out.astype(self.problem.wide, copy=False), lse, self.sinks)
        result = self.rounded(out)
        return result, Saved(q, k, v, result, lse.astype(self.problem.wide), self.problem, self.sinks, self.dropout)

    def rounded(self, total: Array) -> Array:
        """Return complete sums in the dtype of the problem, in memory that nothing else uses."""
        assert self.problem is not None
        dtype = self.problem.dtype
        result: Array = total if total.dtype == dtype != self.problem.wide else arrays.cast(total, dtype)
        return result

    def plan(self, problem: Problem) -> None:
        """Make what depends on the problem only: called when it differs from the last one."""
        raise NotImplementedError

    def positions(self, tokens: int) -> Positions:
        """Return the global positions of this rank's tokens, int64, for a sequence of that many."""
        return layouts.positions(self.layout, tokens, self.comm.Get_size(), self.comm.Get_rank())

    def owned(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> layouts.Where:
        """Return where a rank's share of a whole array lies: a function of the whole's shape and the rank.

        Parameters
        ----------
        name : {"q", "k", "v", "out"}
            Gradients and lse lie as what they belong to; all have their tokens on axis 2.
        shapes : dict
            Shape of the whole "q" and the whole "k", at least.
        """
        return layouts.by_tokens(self.layout, self.comm.Get_size())

    def parcels(
        self, name: str, specs: Sequence[Sequence[arrays.Spec]], buffers: int = 0, anew: bool = False
    ) -> list[Parcel]:
        """Return a parcel for each list of specs; they keep their storage until the problem changes.

        Parcel s lives in buffer s % buffers; with 0 each has a buffer of its own. `anew` says that a parcel's
        arrays are asked for anew before each kernel call. On GPUs, which do what is queued, its messages then
        wait only for what is queued on its own buffer; and one more buffer lets them run ahead of the queue.
        """
        tracked = anew and self.xp.__name__ == "cupy"
        count = min(buffers + (tracked and buffers > 0), len(specs)) or len(specs)
        if name not in self.storage:
            self.uses[name] = [arrays.Uses() if tracked else None for _ in range(count)]
            different = [{id(group): group for group in specs[start::count]} for start in range(count)]
            largest = [max(map(arrays.nbytes, groups.values())) for groups in different]
            self.storage[name] = [self.xp.empty(size, np.uint8) for size in largest]
        # Chunks of one shape in one buffer are one parcel. Most share one list, which is then looked at once.
        alike = {id(group): group for group in specs}
        made = {number: self.made.setdefault((name, *group), {}) for number, group in alike.items()}
        result = []
        for step, group in enumerate(specs):
            known, place = made[id(group)], step % count
            if place not in known:
                known[place] = Parcel(group, self.storage[name][place], self.uses[name][place])
            result.append(known[place])
        return result

    def state(self, problem: Problem, q: Array) -> tuple[Array, Array]:
        """Return the (out, lse) of some queries that have attended to nothing."""
        out = self.xp.zeros((*q.shape[:3], problem.v_head_dim), problem.wide)
        return out, self.xp.full(q.shape[:3], -math.inf, problem.wide if self.xp.__name__ == "cupy" else LSE)

    def sums(self, name: str, specs: Sequence[list[arrays.Spec]], buffers: int = 0, anew: bool = False) -> list[Parcel]:
        """Return parcels of partial sums: as `parcels`, but each may travel as another, which is rounded."""
        sums = self.parcels(name, specs, buffers, anew)
        travelling = self.travelling(specs)
        if travelling != list(specs):
            for own, rounded in zip(sums, self.parcels(f"rounded {name}", travelling, buffers, anew), strict=True):
                own.sent_as = rounded
        return sums

    def arriving(self, name: str, specs: Sequence[list[arrays.Spec]]) -> list[Parcel]:
        """Return parcels for sums that arrive one a step; the own one, number 0, may arrive beside another."""
        specs = self.travelling(specs)
        return self.parcels(f"home {name}", specs[:1]) + self.parcels(f"arriving {name}", specs, buffers=1)[1:]

    def travelling(self, specs: Sequence[list[arrays.Spec]]) -> list[list[arrays.Spec]]:
        """Return partial sums as they travel; see `Problem.sent`."""
        assert self.problem is not None
        return [self.problem.sent(sums) for sums in specs]

    def free(self) -> None:
        """Free the communicators that this object made."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        # After an exception the other ranks may be elsewhere: freeing is collective and could hang.
        if exception[0] is None:
            self.free()

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
        return self.prepare(problem, like, dropout if dropout and dropout.rate else None)

    def agree_backward(self, d_out: object, saved: Saved) -> Problem:
        """Agree with all ranks on the gradient that arrived, and on the problem it belongs to."""
        problem = saved.problem
        own = (problem.layout, problem.mask) == (self.layout, self.mask)
        given = saved.sinks is not None, *drawn(saved.dropout)
        table = self._gather(saved.out, d_out, numbers=(own, *problem.sizes, *given))
        specs = described(table.tobytes(), self.comm.Get_size(), 2)
        if not own:
            raise InputError("saved is of an attention with another layout or mask")
        for rank, (out, gradient) in enumerate(specs):
            if gradient != out:
                raise InputError(f"d_out on rank {rank} is {show(gradient)}, but out is {show(out)}")
        return self.prepare(problem, saved.q, saved.dropout)

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
        if self.problem is None or xp is not np or xp is not self.xp:
            options = self.mask, self.scale, self.kernel_name, self.softcap, dropout
            kernel = kernels.choose(xp.__name__, problem, *options)
            kernel.rounds = self.final
            if hasattr(self.kernel, "kernel"):  # a TracedKernel
                self.kernel.kernel = kernel
            else:
                self.kernel = kernel

    def replan(self, problem: Problem, xp: Any) -> None:
        """Plan for a problem of arrays of that namespace."""
        if xp.__name__ == "cupy":
            device.attach(self, xp, self.gpu_messages)
        self.xp = xp
        self.storage.clear()
        self.made.clear()
        self.plan(problem)
        self.problem = problem

    def _gather(self, *values: object, numbers: Sequence[int] = ()) -> NDArray[np.int64]:
        """Return the descriptions of every array of every rank, and behind them its numbers: a row for each rank."""
        own = np.concatenate([*map(arrays.describe, values), np.array(numbers, np.int64)])
        everything = np.empty((self.comm.Get_size(), len(own)), np.int64)
        self.comm.Allgather(own, everything)
        return everything
