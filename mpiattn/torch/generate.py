"""Generation by a sharded model: transformers' own `generate`, with a cache that is spread over the ranks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ..errors import InputError
from ..messages.message import Communicator
from ..problems.scalars import plain
from .batch import fingerprint, laid_out
from .cache import Generation, SameScores
from .checks import check_tokens
from .weights import refuse

NOT_HERE = "assistant_model", "cache_implementation", "past_key_values", "cache", "prompt_lookup_num_tokens"
"""Arguments of `generate` that need another cache."""

WHERE_FROM = "_from_model_config", "transformers_version"
"""What a configuration says of itself, which differs where rank 0 alone has read a file."""


def generate(sharded: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Generate tokens; see `Sharded.generate`."""
    model, own, reason = sharded.model, dict[str, object](), None
    try:
        own = check(model, input_ids, attention_mask, options)
    except InputError as error:
        reason = str(error)
    refuse(sharded.comm, reason)
    agree_in_groups(sharded.comm, sharded.sequence.Get_size(), {"prompt": fingerprint(input_ids), **own})
    prompt = sharded.call(laid_out(input_ids[:, :-1])) if input_ids.shape[1] > 1 else None
    generation = Generation(sharded, prompt)
    with evaluating(model), same_random_numbers(sharded.sequence), generation.under_way(), torch.no_grad():
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        if prompt is not None:
            ids, positions, _ = prompt.own()
            inputs = {"attention_mask": torch.ones_like(ids), "position_ids": positions, name: generation.cache}
            model.base_model(input_ids=ids, **inputs, use_cache=True)
            generation.prompt = None
            asked = (own.get(key) for key in ("num_beams", "num_return_sequences"))
            copies = max((number for number in asked if isinstance(number, int)), default=1)
            if copies > 1:
                generation.cache.batch_repeat_interleave(copies)
        processors = LogitsProcessorList([*(options.pop("logits_processor", None) or []), SameScores(sharded.sequence)])
        given = {"attention_mask": torch.ones_like(input_ids), "logits_processor": processors, name: generation.cache}
        result: Tensor = model.generate(input_ids, **given, **options)
    return result


def check(
    model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> dict[str, object]:
    """Return the `settings` of a call, or raise InputError where generation over ranks can't do what is asked for."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        raise InputError("input_ids must be a tensor (batch, tokens), with a token at least")
    if input_ids.device != model.device:
        raise InputError(f"input_ids are on {input_ids.device}, the model on {model.device}")
    check_tokens(model, input_ids)
    if isinstance(attention_mask, GenerationConfig):
        raise InputError("the second argument is attention_mask: give a GenerationConfig as generation_config=...")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise InputError(f"attention_mask must be a tensor (batch, tokens) of 1, got {type(attention_mask).__name__}")
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise InputError(f"generation_config must be a GenerationConfig, got {type(config).__name__}")
    padding = getattr(model.generation_config, "pad_token_id", None)
    hidden = attention_mask is None and padding not in (None, model.generation_config.eos_token_id)
    if (attention_mask is not None and (attention_mask != 1).any()) or (hidden and (input_ids == padding).any()):
        raise InputError("prompts must have one length, without padding: generate shorter ones by themselves")
    own = settings(model, options)
    given = {**options, **own}
    wrong = [name for name in NOT_HERE if given.get(name) is not None]
    if wrong or given.get("use_cache") is False:
        raise InputError(f"{' and '.join(wrong) or 'use_cache=False'} can't be combined with a cache spread over ranks")
    if given.get("max_time") is not None:
        raise InputError("max_time goes by each rank's own clock, and they would stop apart: give max_new_tokens")
    return own


def settings(model: Any, options: dict[str, Any]) -> dict[str, object]:
    """Return the options that a call of `generate` has, by its arguments, its configuration, or the model's.

    Those that are objects, such as a streamer, which rank 0 alone may have, are left out.
    """
    configs = [model.generation_config, options.get("generation_config")]
    result: dict[str, object] = {}
    for given in (*(config.to_dict() for config in configs if config is not None), options):
        said = {name: comparable(value) for name, value in given.items() if name not in WHERE_FROM}
        result |= {name: value for name, value in said.items() if value is not None}
    return result


def comparable(value: object) -> object:
    """Return plain values, tensors, and lists and dicts of them, as ranks can compare them; of other objects, None."""
    if isinstance(value, Tensor):
        return fingerprint(value)
    if isinstance(value, dict):
        return [(str(key), comparable(value[key])) for key in sorted(value, key=str)]
    if isinstance(value, (list, tuple)):
        return [comparable(one) for one in value]
    value = plain(value)
    return value if isinstance(value, (bool, int, float, str)) else None


def agree_in_groups(comm: Communicator, members: int, own: dict[str, object]) -> None:
    """Raise InputError on every rank, where one has something else than the first of its group. One collective."""
    table = comm.allgather(own)
    for rank, given in enumerate(table):
        first = rank - rank % members
        for name in {**given, **table[first]}:
            if given.get(name) != table[first].get(name):
                raise InputError(
                    f"rank {rank} was given another {name} than rank {first}: a group's ranks take the same"
                )


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Let a model compute without its dropout, and each part of it be in the mode that it was in afterwards."""
    training = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in training:
            part.training = mode


@contextlib.contextmanager
def same_random_numbers(comm: Communicator) -> Iterator[None]:
    """Let all ranks draw rank 0's random numbers, and go on with their own afterwards."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
    shared = comm.bcast([state.numpy() for state in states])
    put(list(map(torch.from_numpy, shared)))
    try:
        yield
    finally:
        if comm.Get_rank():
            put(states)


def put(states: list[Tensor]) -> None:
    """Set the state of torch's generators: the CPU's, and the current GPU's if there is a second one."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
