"""The methods of a kernel, whatever computes: NumPy, torch, CuPy, cuDNN, FlashAttention-4, or nothing, in virtual time.

Arrays are (batch, heads, tokens, head_dim); k and v may have fewer heads, which divide those of q. All that `forward`
and `backward` take beside q, k, v is passed by name. A block says which of the rows are computed, and which keys each
of them sees.

`forward` merges into (out, lse), `backward` adds to (d_q, d_k, d_v), block after block. An algorithm may say by `begin`
that sums hold nothing yet, whatever their memory holds. Then it calls `settle` once before such a sum is sent, and
`complete` once before it is used, and until then a kernel that computes its shares in memory of its own may let them
wait. All other sums hold zeros, and -inf in lse, or what was added before: they are complete when a call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..arrays import Array
from ..messages.parcel import Parcel
from ..problems.block import ALL, Block
from ..problems.dropout import Dropout

Progress = Callable[[], object]
"""Called between the parts of a computation, so that an MPI library can move messages meanwhile."""


class Kernel(Protocol):
    """Attention of one rank's block, forward and backward."""

    @property
    def name(self) -> str:
        """The name that the option `kernel` takes."""
        ...

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop probabilities from now on, or none, in arrays whose first query head has this number among all."""
        ...

    def remember(self, delta: Array, out: Array) -> None:
        """Say of which output `delta` is rowsum(d_out * out): a kernel may rather use that."""
        ...

    def begin(self, *sums: Array) -> None:
        """Let sums hold nothing: zeros, and -inf in the lse of (out, lse)."""
        ...

    def forward(
        self, q: Array, k: Array, v: Array, *, block: Block, out: Array, lse: Array, progress: Progress | None = None
    ) -> None:
        """Merge the attention of the block's queries to its keys into (out, lse), in place.

        Parameters
        ----------
        q : (batch, heads, q_tokens, head_dim)
        k : (batch, kv_heads, k_tokens, head_dim)
        v : (batch, kv_heads, k_tokens, v_head_dim)
            float64, float32, float16 or bfloat16, contiguous or not.
        block : Block
            Its `rows` of q, out and lse are computed.
        out : float32 or float64, (batch, heads, q_tokens, v_head_dim)
            Normalised output so far; zeros at the start.
        lse : float64, (batch, heads, q_tokens)
            Natural logarithm of the sum of exponentials so far; -inf at the start.
        progress : callable, optional
        """
        ...

    def backward(
        self, q: Array, k: Array, v: Array, *, block: Block, d_out: Array, lse: Array, delta: Array, d_q: Array,
        d_k: Array, d_v: Array, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Add this block's share of the gradients to d_q, d_k and d_v, in place.

        Parameters
        ----------
        q, k, v, block, progress
            As in `forward`; the block's `rows` of q, d_out, lse, delta and d_q are meant.
        d_out : (batch, heads, q_tokens, v_head_dim)
            Gradient with respect to the output.
        lse, delta : float64, and the dtype of partial sums; (batch, heads, q_tokens)
            Of the whole rows, all keys: the final lse, and rowsum(d_out * out).
        d_q, d_k, d_v : float32 or float64, shapes of q, k, v
            Gradients so far; zeros at the start.
        """
        ...

    def settle(self, sums: Parcel, *arrived: Sequence[Array]) -> None:
        """Let a parcel that is to be sent hold all that was added to it, and beside that the sums that arrived."""
        ...

    def complete(self, sums: Sequence[Array], *arrived: Sequence[Array]) -> Sequence[Array]:
        """Return complete sums, those that arrived added; they may be new arrays, of the inputs' dtype."""
        ...


def rows_of(block: Block, *arrays: Array) -> Sequence[Array]:
    """Return the rows of a chunk's arrays that a block's queries are."""
    return arrays if block.rows == ALL else [array[:, :, block.rows] for array in arrays]
