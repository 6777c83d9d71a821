"""What every algorithm is to those who call it: how it is built, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import arrays
from ..arrays import Array
from ..arrays.softmax import LSE, delta, sink_gradient, with_sinks
from ..errors import InputError
from ..messages.reduction import all_reduce
from ..problems import layout as layouts
from ..problems.mask import Positions
from ..problems.problem import Problem
from .given import Given
from .prepared import Prepared, Saved
from .shares import Where, by_tokens

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Attention(Prepared):
    """Exact attention of a sequence that is spread over the ranks of a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All its ranks build and call the algorithm together.
    *own : functools.partial
        For subclasses: the checks of their own arguments; see `options.agree`.
    layout : {"contiguous", "zigzag", "striped"}, optional
        Which tokens each rank owns. By default zigzag with a causal mask without a window, which balances it, else
        contiguous.
    mask : Mask
        Evaluated on global positions.
    scale : float, optional
        Of the scores; 1/sqrt(head_dim) by default.
    softcap : float, optional
        Scores become softcap * tanh(scores / softcap) before the mask (Gemma 2, arXiv 2408.00118).
    partials : {"wide", "narrow"}
        How partial sums (out, dQ, dK, dV) travel: as they are added up, in float32 or wider, or rounded to the dtype
        of q for each hop, which halves their bytes with float16 and bfloat16 and adds its rounding error. In
        allgather, decode and tensor_parallel they are always wide.
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

    copied: frozenset[str] = frozenset()
    """Which of "q", "k", "v", "out" are the same on every rank, as are their gradients; see `owned`."""

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
            With `saved.lse`: float64, (batch, heads, tokens).
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
        total = sink_gradient(saved.sinks, saved.lse, delta(d_out, saved.out))
        if problem.q_spread:
            all_reduce(self.comm, total)
        return total

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Return the complete out and lse of this rank's queries: out in the dtype of partial sums.

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
        given = self.sinks, self.dropout, self.identity
        return result, Saved(q, k, v, result, lse.astype(LSE), self.problem, *given)

    def rounded(self, total: Array) -> Array:
        """Return complete sums in the dtype of the problem, in memory that nothing else uses."""
        assert self.problem is not None
        dtype = self.problem.dtype
        result: Array = total if total.dtype == dtype != self.problem.wide else arrays.cast(total, dtype)
        return result

    def positions(self, tokens: int) -> Positions:
        """Return the global positions of this rank's tokens, int64, for a sequence of that many."""
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
        """Free the communicators that this object made."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        # After an exception the other ranks may be elsewhere: freeing is collective and could hang.
        if exception[0] is None:
            self.free()
