"""The cache of transformers' `generate`, spread over the ranks.

Any algorithm computes the prompt, all tokens but the last, of which each rank keeps the keys and values of its own.
From then on every rank computes the new tokens, whose keys and values go to the ranks in turn, and attends to its
part of the cache; `DecodeAttention` combines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import Cache, DynamicLayer

from ..algorithms import DecodeAttention
from ..messages.message import Communicator
from ..problems.mask import Causal, Positions, SlidingWindow
from .arrays import queue_of, to_array, to_tensor
from .call import Call
from .hugging_face import GENERATING

DECODES_WITH: dict[str, Any] = {"kernel": None, "gpu_messages": "auto"}
"""Options of the prompt's algorithm that are also those of decoding."""


class Generation:
    """One call of `generate`: the ranks' parts of the cache, and what attends to them.

    Parameters
    ----------
    sharded : Sharded
    prompt : Call, optional
        All tokens of the prompt but the last, until they are computed; none where there is one token.
    """

    def __init__(self, sharded: Any, prompt: Call | None) -> None:
        self.sharded, self.prompt = sharded, prompt
        self.comm = sharded.sequence
        self.decoders: dict[tuple[Any, ...], DecodeAttention] = {}
        layers = sharded.model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[Layer(self) for _ in range(layers)])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None, softcap: float | None,
        sinks: Tensor | None, layer: int, **_: object,
    ) -> Tensor:  # fmt: skip
        """Attend for a layer: the new queries to the cache of all ranks; first of all, the prompt's to its keys."""
        part = self.cache.layers[layer]
        if self.prompt is not None:
            out: Tensor = self.prompt.attend(
                q, k, v, window=window, scale=scale, softcap=softcap, sinks=sinks, dropout=0.0, layer=layer
            )
        else:
            decoder = self.decoder(window, scale, softcap)
            with queue_of(q):
                queries, keys, values = map(to_array, (q, k, v))
                logits = None if sinks is None else to_array(sinks)
                out = to_tensor(decoder.forward(queries, keys, values, part.positions, sinks=logits)[0])
        if window is not None:
            part.forget(part.total - window + 1)
        return out

    def decoder(self, window: int | None, scale: float | None, softcap: float | None) -> DecodeAttention:
        """Return what attends to the cache for layers of one kind."""
        key = window, scale, softcap
        if key not in self.decoders:
            mask = Causal() if window is None else SlidingWindow(window - 1)
            options = {
                name: value for name, value in self.sharded.options.items() if name in ("kernel", "gpu_messages")
            }
            self.decoders[key] = DecodeAttention(self.comm, mask=mask, scale=scale, softcap=softcap, **options)
        return self.decoders[key]

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Let the layers find this object; what attends to the cache ends with it."""
        token = GENERATING.set(self)
        try:
            yield
        finally:
            GENERATING.reset(token)
            for decoder in self.decoders.values():
                decoder.free()


class Layer(DynamicLayer):
    """A rank's part of a layer's keys and values, in transformers' cache."""

    is_croppable = False

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self.generation = generation
        self.positions: Positions = np.zeros(0, np.int64)
        self.total = 0
        """Tokens of the whole sequence so far."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keep this rank's keys and values; return what the layer's attention takes."""
        call, comm = self.generation.prompt, self.generation.comm
        if call is not None:
            own, self.total = call.mine.cpu().numpy(), call.batch.input_ids.shape[1]
            self.keys, self.values = (states[:, :, : len(own)] for states in (key_states, value_states))
            self.positions, self.is_initialized = own, True
            return key_states, value_states
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states[:, :, :0], value_states[:, :, :0], True
        new = np.arange(self.total, self.total + key_states.shape[2])
        mine = new % comm.Get_size() == comm.Get_rank()
        self.keys, self.values = (
            torch.cat([kept, states[:, :, torch.as_tensor(mine, device=states.device)]], dim=2)
            for kept, states in ((self.keys, key_states), (self.values, value_states))
        )
        self.positions = np.concatenate([self.positions, new[mine]])
        self.total += len(new)
        return self.keys, self.values

    def forget(self, first: int) -> None:
        """Keep only the tokens from this position on."""
        gone = int(np.searchsorted(self.positions, first))
        if gone:
            self.keys, self.values = self.keys[:, :, gone:].clone(), self.values[:, :, gone:].clone()
            self.positions = self.positions[gone:]

    def get_seq_length(self) -> int:
        """Return the tokens of the whole sequence so far."""
        return self.total

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the keys that the mask function is asked for, which knows better."""
        return self.total + int(getattr(query_length, "shape", [query_length])[0]), 0


class SameScores(LogitsProcessor):
    """The scores of rank 0 on every rank: no last bit may part them."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores of rank 0."""
        array = to_array(scores.cpu().clone())
        self.comm.Bcast(array.view(np.uint8))
        return to_tensor(array).to(scores.device)
