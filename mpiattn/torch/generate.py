"""Generation by a sharded model: transformers' own `generate`, with a cache that is spread over the ranks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..errors import InputError
from ..messages.message import Communicator
from .batch import fingerprint, laid_out
from .cache import Generation, SameScores
from .checks import check_tokens
from .weights import refuse

NOT_HERE = "assistant_model", "cache_implementation", "past_key_values", "cache", "prompt_lookup_num_tokens"
"""Arguments of `generate` that need another cache."""


def generate(sharded: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Generate tokens; see `Sharded.generate`."""
    model, reason = sharded.model, None
    try:
        check(model, input_ids, attention_mask, options)
    except InputError as error:
        reason = str(error)
    refuse(sharded.comm, reason)
    plain = {name: value for name, value in options.items() if isinstance(value, (bool, int, float, str))}
    own, members = (fingerprint(input_ids), sorted(plain.items(), key=str)), sharded.sequence.Get_size()
    table = sharded.comm.allgather(own)
    for rank, given in enumerate(table):
        if given != table[rank - rank % members]:
            raise InputError(f"rank {rank} was given another prompt or other options than rank {rank - rank % members}")
    prompt = sharded.call(laid_out(input_ids[:, :-1])) if input_ids.shape[1] > 1 else None
    generation = Generation(sharded, prompt)
    training = model.training
    model.eval()
    with same_random_numbers(sharded.sequence), generation.under_way(), torch.no_grad():
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        if prompt is not None:
            ids, positions, _ = prompt.own()
            inputs = {"attention_mask": torch.ones_like(ids), "position_ids": positions, name: generation.cache}
            model.base_model(input_ids=ids, **inputs, use_cache=True)
            generation.prompt = None
            config = options.get("generation_config") or model.generation_config
            names = "num_beams", "num_return_sequences"
            copies = [options.get(key) or getattr(config, key, None) or 1 for key in names]
            if max(copies) > 1:
                generation.cache.batch_repeat_interleave(max(copies))
        processors = LogitsProcessorList([*options.pop("logits_processor", []), SameScores(sharded.sequence)])
        given = {"attention_mask": torch.ones_like(input_ids), "logits_processor": processors, name: generation.cache}
        result: Tensor = model.generate(input_ids, **given, **options)
    model.train(training)
    for decoder in generation.decoders.values():
        decoder.free()
    return result


def check(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]) -> None:
    """Raise InputError where generation over ranks can't do what is asked for."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        raise InputError("input_ids must be a tensor (batch, tokens), with a token at least")
    if input_ids.device != model.device:
        raise InputError(f"input_ids are on {input_ids.device}, the model on {model.device}")
    check_tokens(model, input_ids)
    padding = getattr(model.generation_config, "pad_token_id", None)
    hidden = attention_mask is None and padding not in (None, model.generation_config.eos_token_id)
    if (attention_mask is not None and (attention_mask != 1).any()) or (hidden and (input_ids == padding).any()):
        raise InputError("prompts must have one length, without padding: generate shorter ones by themselves")
    wrong = [name for name in NOT_HERE if options.get(name) is not None]
    if wrong or options.get("use_cache") is False:
        raise InputError(f"{' and '.join(wrong) or 'use_cache=False'} can't be combined with a cache spread over ranks")


@contextlib.contextmanager
def same_random_numbers(comm: Communicator) -> Iterator[None]:
    """Let all ranks draw rank 0's random numbers, and go on with their own afterwards."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
    shared = comm.bcast([state.numpy() for state in states])
    put(list(map(torch.from_numpy, shared)))
    yield
    if comm.Get_rank():
        put(states)


def put(states: list[Tensor]) -> None:
    """Set the state of torch's generators: the CPU's, and the current GPU's if there is a second one."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
