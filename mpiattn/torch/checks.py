"""Which models can be split over ranks by tokens, and what is wrong with the arguments of `shard`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithms import ALGORITHMS
from ..algorithms.options import check_names
from ..algorithms.sharing import check_sharing
from ..errors import InputError
from ..problems.scalars import shown, whole
from .batch import IGNORED

SET_BY_MODEL = "mask", "scale", "softcap"
"""Options of algorithms that each layer of a model sets for itself."""


def check(algorithm: str, data: int, ranks: int) -> None:
    """Raise ValueError where the algorithm does not share out tokens, or the groups do not fit."""
    check_sharing(algorithm)
    groups = whole(data)
    if groups is None or groups < 1 or ranks % groups:
        fits = [number for number in range(1, ranks + 1) if ranks % number == 0]
        raise ValueError(f"{ranks} ranks do not make {shown(data)} groups: choose from {fits}")


def check_options(algorithm: str, *options: str) -> None:
    """Raise ValueError where these are no names of options that the algorithm takes from a caller of `shard`."""
    for name in options:
        if name in SET_BY_MODEL:
            raise ValueError(f"{name} is set by the model, for each layer: leave it out, or change the model's config")
    check_names(ALGORITHMS[algorithm], options, without=SET_BY_MODEL)


def check_model(model: torch.nn.Module) -> None:
    """Raise ValueError where tokens of a model meet elsewhere than in attention, or in one that can't be split."""
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ValueError(f"a model is one of transformers, got {type(model).__name__}")
    name, config = type(model).__name__, model.config.get_text_config()
    kinds: Sequence[str] = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    other = sorted({*kinds} - {"full_attention", "sliding_attention", "attention"})
    parameters = inspect.signature(model.forward).parameters
    reasons = {
        f"has layers of the kind {', '.join(other)}": bool(other),
        "has an encoder and a decoder": config.is_encoder_decoder,
        "has position biases": getattr(config, "alibi", False) or hasattr(config, "relative_attention_num_buckets"),
        "has convolutions or recurrence": any(
            isinstance(part, (torch.nn.Conv1d, torch.nn.RNNBase)) for part in model.modules()
        ),
        "adds a loss of its router, a mean over the tokens of one rank": getattr(config, "output_router_logits", False),
        "does not call attention by name": not model._can_set_attn_implementation(),
        "takes no position_ids": "position_ids" not in parameters,
        "does not hand arguments on to its layers": all(p.kind != p.VAR_KEYWORD for p in parameters.values()),
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if wrong:
        raise ValueError(f"{name} can't be split over ranks by tokens: it {' and '.join(wrong)}")


def check_tensors(model: torch.nn.Module, tensors: dict[str, object]) -> None:
    """Raise InputError where these are no tensors on the model's device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "input_ids"):
            raise InputError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.device != model.device:
            raise InputError(f"{name} is on {tensor.device}, the model on {model.device}: move one of them with .to()")


def check_tokens(model: Any, input_ids: Tensor, labels: Tensor | None = None) -> None:
    """Raise InputError where these are no tokens of the model: one rank alone would compute them, and find out."""
    head = model.get_output_embeddings() or model.get_input_embeddings()
    known = (
        ("input_ids", input_ids, model.get_input_embeddings(), (torch.int64, torch.int32)),
        ("labels", labels, head, (torch.int64,)),
    )
    for name, tensor, weights, dtypes in known:
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise InputError(f"{name} must be of {dtypes[0]}, got {tensor.dtype}")
        count = weights.weight.shape[0]
        others = (tensor < 0) | (tensor >= count)
        if name == "labels":
            others &= tensor != IGNORED
        if others.any():
            but = f", and {IGNORED} of what is no target" if name == "labels" else ""
            raise InputError(f"{name} has {int(tensor[others][0])}: the model has tokens 0 to {count - 1}{but}")


def windows_alone(config: Any) -> bool:
    """Return whether all layers have a window: their keys are near."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    return getattr(config, "sliding_window", None) is not None and kinds == {"sliding_attention"}
