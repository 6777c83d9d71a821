"""The attention that Hugging Face's models call by the name "mpiattn", and its mask function.

Transformers calls the mask function once for each kind of layer, and hands on to every layer what it returns. Without
one, it would hand on no mask, and padding would go by unseen; with an ordinary one, a rank's positions, which do not
follow one another, would look like packed documents. So `shard` settles which token sees which, from the whole batch,
and the mask function only finds out whether that is what the layers ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

NAME = "mpiattn"

GENERATING: ContextVar[Any] = ContextVar("generating", default=None)
"""Function that layers call while `Sharded.generate` runs, as `generate` hands no arguments of ours on to them."""

FAR = 2**20
"""A position beyond all windows, to ask a mask function at."""


@dataclass(frozen=True)
class Pattern:
    """Mask that layers of one kind see, as the mask function passes it on to them."""

    window: int | None
    """How many tokens a query sees at most, itself included."""
    known: bool
    """Whether that is all there is to it."""


def pattern(
    *_: object, mask_function: Callable[..., Any] | None = None, local_size: int | None = None, **__: object
) -> Pattern:
    """Return what a mask function lets a query see; the arguments are those that transformers gives by name."""

    def sees(query: int, key: int) -> bool:
        zero = torch.tensor(0)
        return bool(mask_function(zero, zero, torch.tensor(query), torch.tensor(key)))  # type: ignore[misc]

    try:
        if local_size is None:
            first = sees(FAR, 0)
        else:
            first = sees(FAR, FAR - local_size + 1) and not sees(FAR, FAR - local_size)
        known = first and sees(FAR, FAR) and not sees(FAR, FAR + 1)
    except Exception:  # one that looks up what it was made for, such as the place of images
        known = False
    return Pattern(local_size, known)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend for a layer of a model that `shard` has been given; the arguments are transformers'.

    Returns
    -------
    out : (batch, tokens, heads, head_dim)
    weights : None
    """
    call, name = others.get(NAME) or GENERATING.get(), type(module).__name__
    if call is None:
        raise InputError(
            "a model with attn_implementation='mpiattn' is called through mpiattn.torch.shard(model, comm), "
            "which knows the other ranks"
        )
    for what in ("position_bias", "alibi", "head_mask"):
        if others.get(what) is not None:
            raise InputError(f"{name} gives attention a {what}, which can't be split over ranks here")
    if others.get("output_attentions"):
        raise InputError("no rank has whole rows of attention weights: output_attentions must be False")
    if not isinstance(attention_mask, Pattern) or not attention_mask.known:
        raise InputError(
            f"{name} asks for a mask of its own: what can be split is causal, with a window or without, "
            "and padding and packed documents as arguments"
        )
    if torch.is_autocast_enabled(query.device.type):  # which casts for torch's own attention, but not for this one
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    out = call.attend(
        query, key, value, window=attention_mask.window, scale=scaling, softcap=softcap, sinks=s_aux, dropout=dropout,
        layer=getattr(module, "layer_idx", None) or 0,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Let transformers know both by name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, pattern)
