"""Generation over the ranks: the tokens of one process, with a cache of which each rank holds a part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mpi4py import MPI
from tiny_models import tiny, tokens
from transformers import GenerationConfig
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


def test_an_error_leaves_all_as_it_was(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpiattn.torch import cache

    built, decoder = [], cache.Generation.decoder

    def noted(*arguments: Any) -> Any:
        built.append(decoder(*arguments))
        return built[-1]

    monkeypatch.setattr(cache.Generation, "decoder", noted)

    def enough(input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        if input_ids.shape[1] == 12:
            raise KeyError("enough")
        return torch.zeros(len(input_ids), dtype=torch.bool)

    model = tiny("llama").train()
    model.model.layers[0].eval()  # frozen by the user, say
    modes = [part.training for part in model.modules()]
    with mpiattn.torch.shard(model, comm) as sharded:
        torch.manual_seed(20 + comm.Get_rank())
        expected = torch.rand(1) if comm.Get_rank() else None
        torch.manual_seed(20 + comm.Get_rank())
        with pytest.raises(KeyError, match="enough"):
            sharded.generate(tokens(1, 9), max_new_tokens=NEW, stopping_criteria=[enough])
        assert expected is None or torch.equal(torch.rand(1), expected)
        assert [part.training for part in model.modules()] == modes
        assert built and all(one.ended for one in built)
        sharded.generate(tokens(1, 9), max_new_tokens=2)  # and goes on
        assert [part.training for part in model.modules()] == modes


def test_a_configuration_is_taken_as_options_are(comm: MPI.Intracomm) -> None:
    prompt, model = tokens(1, 13), tiny("llama")
    torch.manual_seed(11)
    expected = reference(model, prompt, do_sample=True, num_return_sequences=2)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
    with mpiattn.torch.shard(model, comm) as sharded:
        torch.manual_seed(11)
        assert torch.equal(sharded.generate(prompt, generation_config=config, logits_processor=None), expected)


@pytest.mark.parametrize("what", ["generation_config", "eos_token_id", "sequence_bias", "model"])
def test_options_of_any_kind_are_compared(comm: MPI.Intracomm, what: str) -> None:
    # Ranks that go on for another number of tokens would wait for each other.
    if comm.Get_size() == 1:
        pytest.skip("there is no other rank")
    here, model = int(comm.Get_rank() == comm.Get_size() - 1), tiny("llama")
    options: dict[str, Any] = {
        "generation_config": {"generation_config": GenerationConfig(max_new_tokens=2 + here)},
        "eos_token_id": {"eos_token_id": [3, 4 + here], "max_new_tokens": 2},
        "sequence_bias": {"sequence_bias": {(3 + here, 4): -1.0}, "max_new_tokens": 2},
        "model": {"max_new_tokens": 2},
    }
    if what == "model":
        model.generation_config.eos_token_id = 3 + here  # one of rank 0's file, say
    names = {"generation_config": "max_new_tokens", "model": "eos_token_id"}
    with (
        mpiattn.torch.shard(model, comm) as sharded,
        pytest.raises(mpiattn.InputError, match=f"another {names.get(what, what)} than rank 0") as raised,
    ):
        sharded.generate(tokens(1, 9), **options[what])
    assert len(set(comm.allgather(str(raised.value)))) == 1


def test_arguments_in_the_place_of_others(comm: MPI.Intracomm) -> None:
    with mpiattn.torch.shard(tiny("llama"), comm) as sharded:
        generate: Any = sharded.generate
        with pytest.raises(mpiattn.InputError, match=r"give a GenerationConfig as generation_config=\.\.\."):
            generate(tokens(1, 9), GenerationConfig(max_new_tokens=2))
        with pytest.raises(mpiattn.InputError, match=r"attention_mask must be a tensor .* of 1, got list"):
            generate(tokens(1, 9), attention_mask=[[1] * 9], max_new_tokens=2)
        with pytest.raises(mpiattn.InputError, match="max_time goes by each rank's own clock"):
            generate(tokens(1, 9), generation_config=GenerationConfig(max_time=1.0))
        with pytest.raises(mpiattn.InputError, match="use_cache=False can't be combined"):
            generate(tokens(1, 9), generation_config=GenerationConfig(use_cache=False))
        with pytest.raises(mpiattn.InputError, match="generation_config must be a GenerationConfig, got dict"):
            generate(tokens(1, 9), generation_config={"max_new_tokens": 2})


@pytest.mark.parametrize("wrong", ["prompt", "options", "padding", "no cache"])
def test_bad_input_is_one_error_on_all_ranks(comm: MPI.Intracomm, wrong: str) -> None:
    here = comm.Get_rank() == comm.Get_size() - 1
    prompt, options = tokens(1, 9), dict[str, Any](max_new_tokens=2)
    words = {
        "prompt": "another prompt",
        "options": "another max_new_tokens",
        "padding": "one length",
        "no cache": "use_cache",
    }
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
