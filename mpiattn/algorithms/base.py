"""The base of every algorithm: how it is built and called, forward, backward, and its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .. import arrays, kernels
from ..arrays import Array
from ..arrays.operations import cast, of
from ..arrays.softmax import LSE, delta, sink_gradient, with_sinks
from ..errors import InputError
from ..kernels.contract import Kernel
from ..messages.connection import abandon, freed, kernel_on, on_device, private
from ..messages.device.channel import Channel, check_mode
from ..messages.message import Communicator
from ..messages.observer import named
from ..messages.reduction import all_reduce
from ..problems import layout as layouts
from ..problems.dropout import Dropout
from ..problems.mask import Mask, Positions
from ..problems.problem import Problem
from ..problems.user_mask import held
from .agreement import Agreement, settled
from .buffers import Buffers
from .given import Given, numbered
from .options import (
    Check,
    agree,
    alike,
    as_float,
    check_deterministic,
    check_mask,
    check_partials,
    check_scale,
    check_softcap,
)
from .posed import posed
from .saved import Saved, check_saved, fingerprint
from .shares import Where, by_tokens

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Attention:
    """Exact attention of a sequence that is spread over the ranks of a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        All its ranks build and call the algorithm together. It works on a private duplicate, so that its messages never
        meet the caller's; the duplicate is kept with `comm` and serves every algorithm that is built on it.
    *own : functools.partial
        For subclasses: the checks of their own arguments; see `options.agree`.
    layout : {"contiguous", "zigzag", "striped"}, optional
        Which tokens each rank owns. By default zigzag with a causal mask without a window, which balances it, else
        contiguous.
    mask : Mask, optional
        Evaluated on global positions. By default every query attends to every key.
    scale : float, optional
        Of the scores; 1/sqrt(head_dim) by default.
    softcap : float, optional
        Scores become softcap * tanh(scores / softcap) before the mask (Gemma 2, arXiv 2408.00118).
    partials : {"wide", "narrow"}
        How partial sums (out, dQ, dK, dV) travel: as they are added up, in float32 or wider, or rounded to the dtype
        of q for each hop, which halves their bytes with float16 and bfloat16 and adds its rounding error. In
        allgather, decode and tensor_parallel they are always wide.
    kernel : {"numpy", "torch", "cupy", "cudnn", "flash4"}, optional
        What computes a block. By default the fastest that can do the problem at hand. "numpy" and "cupy" are right for
        scores of any size; "flash4", "cudnn" and "torch" have them in float32, and are 1e-3 off where they are 10,000:
        see docs/limits.md.
    gpu_messages : {"auto", "device", "host"}
        Whether messages between GPUs are of device memory or go through the host's. By default the first,
        if the MPI library turns out to take it.
    deterministic : bool
        Whether gradients are the same bits from run to run on GPUs, too: "cudnn" can't, "flash4" is slower then.

    Raises
    ------
    InputError
        A ValueError, on every rank alike, before any message of the algorithm, where arguments or arrays do not fit.

    Notes
    -----
    Arrays are (batch, heads, tokens, head_dim), float64, float32, float16 or bfloat16, and hold this
    rank's tokens.
    """

    copied: frozenset[str] = frozenset()
    """Arrays, of "q", "k", "v", "out", that are the same on every rank, as are their gradients; see `owned`."""

    kernel: Kernel

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
        deterministic: bool = False,
    ) -> None:
        self.comm = private(comm)
        self.mask = held(mask)
        self.layout = layouts.default(self.mask) if layout is None else layout
        self.scale, self.softcap, self.partials = as_float(scale), as_float(softcap), partials
        self.kernel_name, self.gpu_messages, self.deterministic = kernel, gpu_messages, deterministic
        agree(
            self.comm,
            partial(check_mask, self.mask),
            partial(layouts.check, self.layout, self.comm.Get_size()),
            partial(kernels.check, kernel),
            partial(check_mode, gpu_messages),
            partial(check_scale, scale),
            partial(check_softcap, softcap),
            partial(check_partials, partials),
            partial(check_deterministic, deterministic),
            partial(alike, algorithm=type(self).__name__),
            *own,
        )
        self.agreement, self.buffers = Agreement(self.comm), Buffers()
        self.channel: Channel | None = None
        self.problem: Problem | None = None
        self.sinks: Array | None = None
        self.dropout: Dropout | None = None
        self.first_head = 0
        """Number, among all, of the first query head that this rank computes."""
        self.final = True
        """Whether what it computes is the result, and not a part of another algorithm's sums."""
        self.ended = ""
        """The reason why it can't be used any more, or nothing."""

    # For those who call it

    def forward(self, q: Array, k: Array, v: Array, **given: Unpack[Given]) -> tuple[Array, Saved]:
        """Return this rank's rows of softmax(scale q k^T) v, and what `backward` needs.

        Parameters
        ----------
        q : (batch, heads, tokens, head_dim)
        k : (batch, kv_heads, key tokens, head_dim)
        v : (batch, kv_heads, key tokens, v_head_dim)
            This rank's tokens; heads is a multiple of kv_heads. `backward` reads them again, and out, saved.lse and
            sinks too: they must stay as they are until then. On CPUs a change is found and raises an InputError in
            `backward`; on GPUs it gives wrong gradients.
        sinks : float, (heads,), optional
            A logit for each head of q, the same on every rank, at which there is nothing to attend to: it takes
            its part of each query's softmax (Xiao et al. 2023, arXiv 2309.17453). See `sink_gradient`.
        dropout : Dropout, optional
            The same on every rank.

        Returns
        -------
        out : dtype of q, (batch, heads, tokens, v_head_dim)
        saved : Saved
            With `saved.lse`: float64, (batch, heads, tokens).
        """
        problem = self.agree_forward(q, k, v, **given)
        with self.running("forward"):
            return self.finish(q, k, v, *self.attend(problem, q, k, v))

    def backward(self, d_out: Array, saved: Saved) -> tuple[Array, Array, Array]:
        """Return this rank's rows of dQ, dK, dV, in the dtype of q.

        Parameters
        ----------
        d_out : dtype of out, (batch, heads, tokens, v_head_dim)
            Gradient of this rank's rows of out.
        saved : Saved
            From `forward`, of the same call on every rank.

        Raises
        ------
        InputError
            On every rank, where on one d_out does not fit out, or `saved` is of another attention or call, or was
            changed.
        """
        problem = self.agree_backward(d_out, saved)
        with self.running("backward"):
            row_delta = delta(d_out, saved.out)
            self.kernel.remember(row_delta, saved.out)
            d_q, d_k, d_v = self.gradients(problem, saved.q, saved.k, saved.v, d_out, saved.lse, row_delta)
            return self.rounded(d_q), self.rounded(d_k), self.rounded(d_v)

    def sink_gradient(self, d_out: Array, saved: Saved) -> Array:
        """Return the gradient of the sinks of the heads that out has here, complete, in the dtype of partial sums.

        One all-reduce, where the queries are spread over ranks.

        Parameters
        ----------
        d_out, saved
            As in `backward`.

        Returns
        -------
        (heads,), of all heads but where out has some of them: `tensor_parallel`, and `decode` by an all-to-all

        Raises
        ------
        InputError
            As in `backward`, and where `forward` was given no sinks.
        """
        problem = self.agree_backward(d_out, saved)
        if saved.sinks is None:
            raise InputError("there are no sinks in what was saved: give some to forward")
        with self.running("sink_gradient"):
            total = sink_gradient(saved.sinks, saved.lse, delta(d_out, saved.out))
            if problem.q_spread:
                all_reduce(self.comm, total)
            return total

    def positions(self, tokens: int) -> Positions:
        """Return the global positions of this rank's tokens, int64, for a sequence of that many."""
        if freed(self.agreement.comm):
            self.usable()
        return layouts.positions(self.layout, tokens, self.comm.Get_size(), self.comm.Get_rank())

    def owned(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Where:
        """Return where a rank's share of a whole array lies: a function of the whole's shape and the rank.

        Parameters
        ----------
        name : {"q", "k", "v", "out"}
            Gradients and lse lie as what they belong to; all have their tokens on axis 2.
        shapes : dict
            Shape of the whole "q" and the whole "k", at least.
        """
        return by_tokens(self.layout, self.comm.Get_size())

    def free(self) -> None:
        """End it, and give its memory back; to end it again is no error."""
        self.end("this attention has ended: build another one, inside `with`, or before `free`")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.free()
        else:  # the other ranks may be elsewhere: nothing that takes all of them
            self.end("this attention has ended, by an error inside `with`: build another one")

    def __reduce__(self) -> NoReturn:
        raise TypeError("an attention is not copied or pickled, as it has communicators and buffers: build another one")

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return the arguments of this algorithm's own with which it can be built on that many ranks."""
        return [{}]

    # For each algorithm to say

    def connect(self, comm: Communicator) -> None:
        """Make the grids, rows, columns and rings that the messages go over, from the private communicator.

        Called when the algorithm is built, and again with one that carries device memory when CuPy's arrays first come.
        """
        self.size, self.rank = comm.Get_size(), comm.Get_rank()

    def plan(self, problem: Problem) -> None:
        """Make what depends on the problem only: called when it differs from the last one."""
        raise NotImplementedError

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Return the complete out and lse of this rank's queries: out in the dtype of partial sums.

        The ranks have agreed on the problem, and planned for it.
        """
        raise NotImplementedError

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Return this rank's rows of dQ, dK, dV, in the dtype of partial sums.

        Parameters
        ----------
        problem, q, k, v
            As in `attend`.
        d_out, lse, delta
            Of this rank's queries; delta is rowsum(d_out * out).
        """
        raise NotImplementedError

    # Before the first message

    def agree_forward(self, q: Array, k: Array, v: Array, **given: Unpack[Given]) -> Problem:
        """Agree with all ranks on the problem that the arrays pose, and plan for it."""
        self.usable()
        problem = settled(self.agreement.comm, self.pose(q, k, v, given), self.problem)
        self.sinks, dropout = given.get("sinks"), given.get("dropout")
        return self.prepare(problem, q, dropout if dropout and dropout.rate else None)

    def pose(self, q: Array, k: Array, v: Array, given: Given) -> Problem:
        """Return the problem that the arrays of all ranks pose, which agree on what they are given beside them."""
        table = self.agreement.arrays(numbered(q, given), q=q, k=k, v=v)
        return posed(table.tobytes(), len(table), self.layout, self.mask, self.partials)

    def agree_backward(self, d_out: Array, saved: Saved) -> Problem:
        """Agree with all ranks on the gradient that arrived, and on the problem it belongs to."""
        self.usable()
        check_saved(self.agreement, d_out, saved, self.identity, self.fingerprint)
        return self.prepare(saved.problem, saved.q, saved.dropout)

    def fingerprint(self, q: Array, k: Array, v: Array, *results: Array | None) -> int:
        """Return a number by which `backward` notices that what it reads again is no longer what `forward` left."""
        return fingerprint(q, k, v, *results)

    @property
    def identity(self) -> tuple[object, ...]:
        """Settings that must be the same in `forward` and in the `backward` that uses its result."""
        return type(self).__name__, self.layout, self.mask, self.scale, self.softcap

    def prepare(self, problem: Problem, like: Array, dropout: Dropout | None = None) -> Problem:
        """Plan for a problem of arrays like this one, unless it is the last one."""
        xp = arrays.namespace(like)
        same = problem == self.problem and xp is self.buffers.xp
        if not same and of(xp).QUEUED and self.channel is None:  # arrays of a GPU, for the first time
            self.comm, self.channel = on_device(self.comm, xp, self.gpu_messages)
            self.connect(self.comm)
        if not same:
            self.problem = None
            self.agreement.together(partial(self.renew, problem, xp, dropout))
            self.problem = problem
        elif (dropout is None) != (self.dropout is None):
            self.choose(problem, xp, dropout)
        if dropout is not None or self.dropout is not None:
            self.kernel.drop(dropout, self.first_head)
        self.dropout = dropout
        assert self.problem is not None
        return self.problem

    def renew(self, problem: Problem, xp: ModuleType, dropout: Dropout | None) -> None:
        """Choose a kernel, give back the buffers, and plan."""
        self.choose(problem, xp, dropout)
        self.buffers.renew(problem, xp, self.channel.opened if self.channel else None)
        self.plan(problem)

    def choose(self, problem: Problem, xp: ModuleType, dropout: Dropout | None) -> None:
        """Choose the kernel for a problem of arrays of that namespace."""
        options = self.scale, self.kernel_name, self.softcap, dropout, self.final, self.deterministic
        # Arrays without data have no kernel here: `kernel_on` takes that of their virtual communicator.
        known = xp.__name__ in kernels.KERNELS
        self.kernel = kernel_on(self.comm, kernels.choose(xp.__name__, problem, *options) if known else None)

    def compute_part(self) -> None:
        """Compute a part of another algorithm's sums from now on: no kernel rounds what is still to be added to."""
        self.final = False

    # After the last one

    def finish(self, q: Array, k: Array, v: Array, out: Array, lse: Array) -> tuple[Array, Saved]:
        """Return what `forward` returns, from the complete (out, lse) of this rank's queries."""
        assert self.problem is not None
        if self.sinks is not None:
            out, lse = with_sinks(out.astype(self.problem.wide, copy=False), lse, self.sinks)
        # What the kernel has rounded lies in new memory, and lse beside it.
        result, lse = (out, lse) if self.is_rounded(out) else (self.rounded(out), lse.astype(LSE))
        given = self.sinks, self.dropout, self.identity, self.fingerprint(q, k, v, result, lse, self.sinks)
        return result, Saved(q, k, v, result, lse, self.problem, *given, self.agreement.number())

    def rounded(self, total: Array) -> Array:
        """Return complete sums in the dtype of the problem, in memory that nothing else uses."""
        assert self.problem is not None
        return total if self.is_rounded(total) else cast(total, self.problem.dtype)

    def is_rounded(self, total: Array) -> bool:
        """Return whether the kernel has rounded complete sums, in new memory."""
        assert self.problem is not None
        return bool(total.dtype == self.problem.dtype != self.problem.wide)

    # Its end

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Run a pass of that name, whatever the caller's floating-point settings; if it raises, end for good.

        There may be messages under way then, so no later algorithm may use the same communicators.
        """
        try:
            with np.errstate(all="ignore"), named(f"{type(self).__name__} {name}"):
                yield
        except BaseException as error:
            self.ended = f"a pass of this attention ended in {type(error).__name__}: {error}; build another one"
            abandon(self.agreement.comm, self.buffers)
            raise

    def end(self, why: str) -> None:
        """Give the memory back, and say why it can't be used any more."""
        if not self.ended:
            self.ended, self.sinks = why, None
            self.buffers.renew(None, np)
            vars(self).pop("kernel", None)

    def usable(self) -> None:
        """Raise InputError where it has ended, or its caller's communicator has been freed."""
        if not self.ended and freed(self.agreement.comm):
            self.end("the communicator of this attention has been freed: build another one, on another communicator")
        if self.ended:
            raise InputError(self.ended)
