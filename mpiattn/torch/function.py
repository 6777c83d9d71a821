"""Attention of tensors: one function of torch's autograd around any algorithm."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algorithms import Attention, Saved
from ..arrays.softmax import delta, sink_gradient
from ..errors import InputError
from ..problems.dropout import Dropout
from ..problems.scalars import shown
from .arrays import queue_of, to_array, to_tensor


def attention(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, dropout: Dropout | None = None
) -> Tensor:
    """Return this rank's rows of softmax(scale q k^T) v, with a gradient.

    All ranks call it together, and go backward together. The memory is the tensors' own: CPU tensors are NumPy
    arrays, CUDA tensors CuPy arrays, whose work is queued on torch's current stream.

    Parameters
    ----------
    attention : mpiattn.Attention
        Any algorithm: `mpiattn.MeshAttention(comm, mask=mpiattn.Causal())`. It serves any number of layers.
    q : (batch, heads, tokens, head_dim)
    k : (batch, kv_heads, key tokens, head_dim)
    v : (batch, kv_heads, key tokens, v_head_dim)
        This rank's tokens, float64, float32, float16 or bfloat16.
    sinks : (heads,), optional
        See `mpiattn.Attention.forward`. Its gradient is that of this rank's queries, as every weight's is that of
        this rank's tokens; see `sum_gradients`.
    dropout : mpiattn.Dropout, optional
        The same on every rank.

    Returns
    -------
    (batch, heads, tokens, v_head_dim), in the dtype of q

    Raises
    ------
    mpiattn.InputError
        On every rank, where the tensors of one do not fit.
    """
    return within(None, attention, q, k, v, sinks, dropout)


def within(
    batch: object, attention: Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, dropout: Dropout | None
) -> Tensor:
    """Return what `attention` does; of a batch that the ranks have agreed on, each thing is asked once."""
    check_built(attention)
    result: Tensor = AttentionFunction.apply(attention, batch, dropout, q, k, v, sinks)
    return result


def check_built(attention: object) -> None:
    """Raise InputError where that is no attention. Ranks can't be asked where there is no communicator."""
    if not isinstance(attention, Attention):
        raise InputError(
            f"attention must be an algorithm that is built, such as mpiattn.RingAttention(comm), got {shown(attention)}"
        )


class AttentionFunction(torch.autograd.Function):
    """An algorithm's forward and backward, as torch calls them."""

    @staticmethod
    def forward(
        ctx: Any, attention: Attention, batch: object, dropout: Dropout | None, q: Tensor, k: Tensor, v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend, and leave with torch what backward needs: it may keep it, offload it, or compute it anew."""
        with queue_of(q):
            arrays = [to_array(tensor) for tensor in (q, k, v)]
            given = {} if sinks is None else {"sinks": to_array(sinks)}
            attention.agreement.trust(batch)
            out, saved = attention.forward(*arrays, **given, dropout=dropout)
            result = to_tensor(out)
            # Where the algorithm computed with the arrays it was given, torch keeps the tensors themselves, and so
            # sees whether somebody writes to them before backward.
            tensors = zip((saved.q, saved.k, saved.v), arrays, (q, k, v), strict=True)
            kept = [tensor if own is array else to_tensor(own) for own, array, tensor in tensors]
            ctx.save_for_backward(*kept, result, to_tensor(saved.lse), sinks)
        ctx.attention, ctx.batch = attention, batch
        # Without its arrays: they are torch's, which frees them, or gives others of the same numbers.
        ctx.rest = saved.problem, (saved.dropout, saved.by, saved.print, saved.number)
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # else a second derivative would be 0, without a word
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v and the sinks."""
        try:
            *kept, lse, given = ctx.saved_tensors  # asked for once: checkpointing computes them anew at this moment
        except RuntimeError as error:
            if "inplace" in str(error):  # one was written to since, on this rank perhaps: the others are to know
                with contextlib.suppress(InputError):
                    ctx.attention.backward(to_array(d_out), None)
            raise
        problem, rest = ctx.rest
        with queue_of(d_out):
            q, k, v, out, lse, d_array = map(to_array, (*kept, lse, d_out))
            sinks = None if given is None else to_array(given)
            ctx.attention.agreement.trust(ctx.batch)
            saved = Saved(q, k, v, out, lse, problem, sinks, *rest)
            gradients = ctx.attention.backward(d_array, saved)
            d_sinks = None
            if sinks is not None and ctx.needs_input_grad[6]:
                d_sinks = to_tensor(sink_gradient(sinks, lse, delta(d_array, out))).to(given.dtype)
            return None, None, None, *map(to_tensor, gradients), d_sinks
