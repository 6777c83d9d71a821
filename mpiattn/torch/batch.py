"""A batch as the ranks compute it: rows, or where they are padded or packed, one sequence of documents."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .arrays import to_array

IGNORED = -100
"""The label of a token that is no target."""


@dataclass(frozen=True)
class Batch:
    """Whole rows of tokens, of which each rank then takes its own.

    Attributes
    ----------
    input_ids, position_ids : int64, (rows, tokens)
    labels : int64, (rows, tokens), or None
        Already shifted: what follows each token.
    places : int64, (rows, tokens)
        Where each token lies in the `input_ids.flatten()` that were given.
    documents : tuple of int, or None
        Their lengths, where the one row consists of several.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor | None
    places: Tensor
    documents: tuple[int, ...] | None

    @property
    def targets(self) -> int:
        """The number of tokens that have a label."""
        return 0 if self.labels is None else int((self.labels != IGNORED).sum())


def laid_out(
    input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Batch:  # fmt: skip
    """Return a batch of Hugging Face's as the ranks compute it.

    Rows that are padded, and rows in which positions start again, become one row of documents, without the padding.

    Raises
    ------
    InputError
        Where it can't be computed exactly; it says what can.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise InputError(f"input_ids must be (batch, tokens), with a token at least, got {tuple(input_ids.shape)}")
    shape = input_ids.shape
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != shape:
            raise InputError(f"{name} must be {tuple(shape)} like input_ids, got {tuple(tensor.shape)}")
    positions = torch.arange(shape[1], device=input_ids.device) if position_ids is None else position_ids
    if positions.shape not in (shape, (1, shape[1]), (shape[1],)):
        raise InputError(f"position_ids must be {tuple(shape)} like input_ids, got {tuple(positions.shape)}")
    positions = positions.expand(shape)
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else unpadded(attention_mask)
    shifted = None
    if labels is not None:
        if (labels[~kept] != IGNORED).any():
            raise InputError(f"labels of padding must be {IGNORED}")
        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    places = torch.arange(input_ids.numel(), device=input_ids.device).reshape(shape)
    # As transformers has it: a document ends where the next position is not the next number.
    starts = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    if kept.all() and not starts.any():
        return Batch(input_ids, positions, shifted, places, None)
    starts[:, 0] = True
    first = starts[kept].nonzero().flatten()  # a row that is all padding has none
    lengths = torch.diff(first, append=first.new_tensor([int(kept.sum())]))
    labels = None if shifted is None else shifted[kept][None]
    return Batch(input_ids[kept][None], positions[kept][None], labels, places[kept][None], tuple(lengths.tolist()))


def unpadded(attention_mask: Tensor) -> Tensor:
    """Return which tokens are no padding: bool, (batch, tokens); raise InputError where it is not on the right."""
    kept = attention_mask != 0
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise InputError("attention_mask must hold 0 and 1; packed documents need position_ids that start again")
    if (kept[:, 1:] & ~kept[:, :-1]).any():
        raise InputError("padding must be on the right: tokenizer.padding_side = 'right'")
    if not kept.any():
        raise InputError("all tokens are padding")
    return kept


def fingerprint(tensor: Tensor) -> tuple[object, ...] | None:
    """Return what differs where a tensor does: shape, dtype, checksum."""
    if not isinstance(tensor, Tensor):
        return None if tensor is None else (type(tensor).__name__,)
    return tuple(tensor.shape), str(tensor.dtype), zlib.crc32(to_array(tensor.cpu()).tobytes())
