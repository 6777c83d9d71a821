"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): each rank has all tokens of some of the heads.

    x (all tokens, on every rank)
     | columns of W_q, W_k, W_v: those of this rank's heads
    q, k, v of this rank's heads
     | attention: nothing is sent
    out of this rank's heads
     | rows of W_o: those of this rank's heads, then the all-reduce: `project`
    y (all tokens, on every rank)

Backward, dy is on every rank, and nothing is sent until each rank's share of dx has to be added up: the
other all-reduce, `all_reduce`. `layout.heads` says which heads a rank has, for any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..arrays import FLOATS, Array, accumulator
from ..errors import InputError
from ..messages.message import Communicator
from ..messages.reduction import all_reduce
from ..problems.block import Block
from ..problems.layout import EVERYWHERE, heads
from ..problems.problem import Problem
from .base import Attention
from .options import Options
from .posed import described
from .shares import Where

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TensorParallelAttention(Attention):
    """Attention to all tokens with this rank's heads: nothing is sent but in `project` and `all_reduce`.

    Arrays are (batch, heads of this rank, all tokens, head_dim): `owned` says which heads. Where K/V heads are
    fewer than ranks, each rank that needs one has a copy, and d_k, d_v are the gradients of the copies: as with
    any copied tensor, the sum over the copies is the whole gradient, and who made the copies adds up (their
    weights' gradients, as a rule). Ranks without a head, where ranks outnumber heads, have arrays of none.
    Any layout will do, and makes no difference. Parameters and errors: see `Attention`.
    """

    def __init__(self, comm: Communicator, **options: Unpack[Options]) -> None:
        super().__init__(comm, **options)
        self.layout = EVERYWHERE
        self.connect(self.comm)

    def owned(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Where:
        """Return where a rank's heads lie; see `Attention.owned`."""
        counts, size = (shapes["q"][1], shapes["k"][1]), self.comm.Get_size()
        return lambda shape, rank: (slice(None), heads(*counts, size, rank)[name in "kv"])

    def plan(self, problem: Problem) -> None:
        """Number the tokens, and the heads."""
        self.first_head = sum(heads for heads, _ in problem.spread_heads[: self.rank])
        self.block = Block(problem.mask, problem.q_positions[0], problem.kv_positions[0])

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to all tokens."""
        out, lse = self.buffers.state(q)
        if q.shape[1]:
            self.kernel.forward(q, k, v, block=self.block, out=out, lse=lse)
        return out, lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Attend to all tokens, backward."""
        d_q, d_k, d_v = (self.buffers.xp.zeros(array.shape, problem.wide) for array in (q, k, v))
        if q.shape[1]:
            self.kernel.backward(
                q, k, v, block=self.block, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v
            )
        return d_q, d_k, d_v

    def project(self, out: Array, weight: Array) -> Array:
        """Return the output projection of all heads, on every rank: (batch, tokens, features), in the dtype of out.

        Parameters
        ----------
        out : (batch, heads of this rank, tokens, v_head_dim)
        weight : (heads of this rank * v_head_dim, features)
            The rows of W_o for this rank's heads.

        Raises
        ------
        InputError
            On every rank, where the shapes do not fit on one.
        """
        self.usable()
        table = self.agreement.arrays(out=out, weight=weight).tobytes()
        for rank, (out_spec, weight_spec) in enumerate(described(table, self.comm.Get_size(), 2)):
            (shape, _), (rows, _) = out_spec or ((), None), weight_spec or ((), None)
            if len(shape) != 4 or len(rows) != 2 or shape[1] * shape[3] != rows[0]:
                raise InputError(
                    f"on rank {rank}, out is {shape} and weight {rows}: they must be (batch, heads, tokens, head_dim) "
                    "and (heads * head_dim, features)"
                )
        wide = accumulator(out.dtype)
        result: Array = self.all_reduce(rows_of(out).astype(wide) @ weight.astype(wide)).astype(out.dtype)
        return result

    def project_backward(self, d_y: Array, out: Array, weight: Array) -> tuple[Array, Array]:
        """Return the gradients of `project` with respect to out and weight; nothing is sent.

        Parameters
        ----------
        d_y : (batch, tokens, features)
            The same on every rank.
        out, weight
            As in `project`.

        Returns
        -------
        d_out, d_weight
            Of the shapes and dtypes of out and weight.
        """
        wide = accumulator(out.dtype)
        batch, count, tokens, dim = out.shape
        d_rows = d_y.astype(wide) @ weight.astype(wide).T
        d_out = d_rows.reshape(batch, tokens, count, dim).transpose(0, 2, 1, 3)
        d_weight = (rows_of(out).astype(wide).transpose(0, 2, 1) @ d_y.astype(wide)).sum(axis=0)
        return d_out.astype(out.dtype), d_weight.astype(weight.dtype)

    def all_reduce(self, share: Array) -> Array:
        """Return the sum of an array over the ranks, such as of the gradient of the block's input.

        Parameters
        ----------
        share : float32 or float64, the same shape on every rank

        Raises
        ------
        InputError
            On every rank, where it is anything else on one.
        """
        self.usable()
        specs = [spec for [spec] in described(self.agreement.arrays(share=share).tobytes(), self.comm.Get_size(), 1)]
        for rank, spec in enumerate(specs):
            if spec is None or spec != specs[0] or spec[1] not in FLOATS[:2]:
                raise InputError(
                    f"an all-reduce takes float32 or float64 of one shape: rank {rank} has {spec}, rank 0 {specs[0]}"
                )
        total: Array = share.copy()
        all_reduce(self.comm, total)
        return total


def rows_of(out: Array) -> Array:
    """Return out as a row for each token: (batch, tokens, heads * head_dim)."""
    batch, count, tokens, dim = out.shape
    rows: Array = out.transpose(0, 2, 1, 3).reshape(batch, tokens, count * dim)
    return rows
