"""Generation over the ranks: the tokens of one process, with a cache of which each rank holds a part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mpi4py import MPI
from tiny_models import tiny, tokens
from transformers.generation.streamers import BaseStreamer

import mpiattn
import mpiattn.torch

pytestmark = pytest.mark.mpi
NEW = 16


class Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value)

    def end(self) -> None:
        pass


def reference(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    mask = torch.ones_like(prompt)
    result: torch.Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, **options)
    return result


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss", "mistral with a window"])
@pytest.mark.parametrize("algorithm", ["ring", "mesh"])
def test_greedy_tokens_are_those_of_one_process(comm: MPI.Intracomm, family: str, algorithm: str) -> None:
    prompt, model = tokens(2, 21), tiny(family)
    expected = reference(model, prompt, do_sample=False)
    assert len(set(expected[0, 21:].tolist())) > 4
    with mpiattn.torch.shard(model, comm, algorithm) as sharded:
        streamer = Streamer() if comm.Get_rank() == 0 else None
        assert torch.equal(sharded.generate(prompt[:1], max_new_tokens=NEW, streamer=streamer), expected[:1])
        assert streamer is None or len(streamer.tokens) == NEW + 1  # the prompt comes first
        assert torch.equal(sharded.generate(prompt, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize("length", [1, 2])
def test_short_prompts(comm: MPI.Intracomm, length: int) -> None:
    prompt, model = tokens(1, length), tiny("gemma2")
    expected = reference(model, prompt, do_sample=False)
    with mpiattn.torch.shard(model, comm) as sharded:
        assert torch.equal(sharded.generate(prompt, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_sampling_and_beams_are_alike_on_all_ranks(comm: MPI.Intracomm, options: dict[str, Any]) -> None:
    prompt, model = tokens(1, 13), tiny("llama")
    torch.manual_seed(11)
    expected = reference(model, prompt, **options)
    with mpiattn.torch.shard(model, comm) as sharded:
        torch.manual_seed(11 + comm.Get_rank())  # rank 0's counts
        got = sharded.generate(prompt, max_new_tokens=NEW, **options)
        assert torch.equal(got, expected)


def test_the_cache_is_spread_and_windows_are_kept(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpiattn.torch import cache

    seen: list[Any] = []
    made = cache.Generation.__init__

    def noted(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        seen.append(self)

    monkeypatch.setattr(cache.Generation, "__init__", noted)
    with mpiattn.torch.shard(tiny("gemma2"), comm) as sharded:
        sharded.generate(tokens(1, 21), max_new_tokens=NEW, do_sample=False)
    window, everything = seen[0].cache.layers
    held = [comm.allgather(layer.keys.shape[2]) for layer in (window, everything)]
    assert sum(held[1]) == 21 + NEW - 1 and max(held[1]) <= -(-(21 + NEW) // comm.Get_size()) + 2
    assert sum(held[0]) == 6  # of a window of 7, those before the next token


@pytest.mark.parametrize("wrong", ["prompt", "options", "padding", "no cache"])
def test_bad_input_is_one_error_on_all_ranks(comm: MPI.Intracomm, wrong: str) -> None:
    here = comm.Get_rank() == comm.Get_size() - 1
    prompt, options = tokens(1, 9), dict[str, Any](max_new_tokens=2)
    words = {"prompt": "another prompt", "options": "another prompt", "padding": "one length", "no cache": "use_cache"}
    if wrong in ("prompt", "options") and comm.Get_size() == 1:
        pytest.skip("there is no other rank")
    if wrong == "prompt":
        prompt = prompt + here
    elif wrong == "options":
        options["max_new_tokens"] = 2 + here
    elif wrong == "padding":
        options["attention_mask"] = (torch.arange(9) > 1).long()[None]
    else:
        options["use_cache"] = False
    with (
        mpiattn.torch.shard(tiny("llama"), comm) as sharded,
        pytest.raises(mpiattn.InputError, match=words[wrong]) as raised,
    ):
        sharded.generate(prompt, **options)
    assert len(set(comm.allgather(str(raised.value)))) == 1
