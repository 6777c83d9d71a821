"""Block attention on one rank by torch's flash attention for CPUs, which gives (out, lse) as NumPy's kernel does.

It is asked for, or chosen where torch is loaded and bfloat16 or float16 is much faster by it: on cores with matrix
units of their own for these; see `choice`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from mpiattn.arrays import accumulator
from mpiattn.arrays.softmax import merge
from mpiattn.problems.block import Block
from mpiattn.problems.dropout import Dropout

from ..contract import Progress, rows_of
from ..sums import Sums
from .parts import Part, parts

Array = NDArray[Any]
KEPT = 256


class TorchKernel(Sums):
    """Attention of one rank's block, by torch; q, k and v have one head_dim.

    Parameters
    ----------
    scale : float, optional
        Of the scores; 1/sqrt(head_dim) if not given.
    """

    name = "torch"

    def __init__(self, scale: float | None = None) -> None:
        self.scale = scale
        self.known: dict[Block, list[Part]] = {}

    def drop(self, dropout: Dropout | None, first_head: int = 0) -> None:
        """Drop nothing: `choose` gives problems with dropout to the NumPy kernel."""
        assert dropout is None

    def parts(self, block: Block) -> list[Part]:
        """Return the parts of a block, worked out once."""
        if block not in self.known:
            if len(self.known) >= KEPT:
                self.known.clear()
            self.known[block] = parts(block)
        return self.known[block]

    def forward(
        self, q: Array, k: Array, v: Array, *, block: Block, out: Array, lse: Array, progress: Progress | None = None
    ) -> None:
        """Merge the attention of the block's queries to its keys into (out, lse), in place; see `contract.Kernel`."""
        q, out, lse = rows_of(block, q, out, lse)
        queries, keys, values = tensor(q), spread(tensor(k), q.shape[1]), spread(tensor(v), q.shape[1])
        for part in self.parts(block):
            if progress:
                progress()
            mine, seen = queries[:, :, part.rows], (keys[:, :, part.keys], values[:, :, part.keys])
            result, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                mine, *seen, 0.0, part.causal, attn_mask=bias(part, mine.dtype), scale=self.scale
            )
            part_lse = logsum.numpy().astype(lse.dtype)
            if part.visible is not None:
                part_lse[:, :, ~part.visible.any(axis=1)] = -np.inf  # torch says 0 of a row that sees nothing
            merge(out[:, :, part.rows], lse[:, :, part.rows], result.to(wide(q)).numpy(), part_lse)

    def backward(
        self, q: Array, k: Array, v: Array, *, block: Block, d_out: Array, lse: Array, delta: Array, d_q: Array,
        d_k: Array, d_v: Array, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Add this block's share of the gradients to d_q, d_k and d_v, in place; see `contract.Kernel`."""
        q, d_out, lse, delta, d_q = rows_of(block, q, d_out, lse, delta, d_q)
        queries, keys, values = tensor(q), spread(tensor(k), q.shape[1]), spread(tensor(v), q.shape[1])
        gradient = tensor(d_out)
        # Torch takes an output and works out delta = rowsum(d_out * out) itself: this one has that delta.
        square = np.einsum("...td,...td->...t", d_out, d_out, dtype=accumulator(q.dtype))
        factor = np.divide(delta, square, out=np.zeros_like(square), where=square > 0)
        output = (gradient.to(wide(q)) * torch.from_numpy(factor)[..., None]).to(queries.dtype)
        # exp(score - inf) = 0 where there is nothing to see.
        logsum = torch.from_numpy(np.where(np.isneginf(lse), np.inf, lse)).to(wide(q))
        for part in self.parts(block):
            if progress:
                progress()
            mine = (x[:, :, part.rows] for x in (gradient, queries))
            d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *mine, keys[:, :, part.keys], values[:, :, part.keys], output[:, :, part.rows],
                logsum[:, :, part.rows].contiguous(), 0.0, part.causal, attn_mask=bias(part, queries.dtype),
                scale=self.scale,
            )  # fmt: skip
            d_q[:, :, part.rows] += d_query.to(wide(q)).numpy()
            for total, share in ((d_k, d_key), (d_v, d_value)):
                heads = share.to(wide(q)).unflatten(1, (total.shape[1], -1)).sum(2)  # those that share a K/V head
                total[:, :, part.keys] += heads.numpy()


def tensor(array: Array) -> Tensor:
    """Return an array as a tensor in the same memory, or of a copy where torch takes no such memory."""
    if not array.flags.writeable or min(array.strides) < 0:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def wide(array: Array) -> Any:
    """Return torch's dtype of partial sums of inputs like this array."""
    return torch.float64 if array.dtype == np.float64 else torch.float32


def spread(kv: Tensor, heads: int) -> Tensor:
    """Return K or V with a copy for each query head: (batch, heads, tokens, head_dim)."""
    return kv if kv.shape[1] == heads else kv.repeat_interleave(heads // kv.shape[1], dim=1)


def bias(part: Part, dtype: DTypeLike) -> Tensor | None:
    """Return what is added to the scores of a part: -inf where a query does not see a key."""
    if part.visible is None:
        return None
    return torch.zeros(part.visible.shape, dtype=dtype).masked_fill_(torch.from_numpy(~part.visible), -torch.inf)
