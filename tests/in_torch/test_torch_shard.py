"""Models of Hugging Face over the ranks: loss and all gradients of one process, or an error that says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from mpi4py import MPI
from one_process import worst
from tiny_models import ALTERNATING, FAMILIES, SIZES, gradients, in_one_process, tiny, tokens

import mpiattn
import mpiattn.torch

pytestmark = pytest.mark.mpi
TOLERANCE = 2e-5


def trained(sharded: Any, *batch: Any, **options: Any) -> tuple[float, list[torch.Tensor]]:
    """Return loss and gradients of a sharded model, whose gradients are none again."""
    out = sharded(*batch, **options)
    out.loss.backward()
    sharded.sum_gradients()
    result = gradients(sharded.model)
    sharded.model.zero_grad()
    return float(out.loss.detach()), result


def same(own: tuple[float, list[torch.Tensor]], expected: tuple[float, list[torch.Tensor]], **how: float) -> bool:
    assert abs(own[0] - expected[0]) < TOLERANCE * abs(expected[0])
    assert worst(own[1], expected[1], **how) < TOLERANCE
    return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("algorithm", ["ring", "mesh", "ulysses"])
def test_a_family_has_the_loss_and_gradients_of_one_process(comm: MPI.Intracomm, family: str, algorithm: str) -> None:
    ids = tokens(2, 29)
    expected = in_one_process(tiny(family), list(ids), list(ids))
    model = tiny(family, seed=comm.Get_rank())  # rank 0's weights count
    with mpiattn.torch.shard(model, comm, algorithm) as sharded:
        assert same(trained(sharded, ids, ids), expected)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layouts_and_gradient_checkpointing(comm: MPI.Intracomm, layout: str, checkpointing: bool) -> None:
    # Zigzag positions look like packed documents, striped ones like a document for each token.
    ids, model = tokens(2, 29), tiny("gemma2")
    expected = in_one_process(model, list(ids), list(ids))
    if checkpointing:
        name = "activation_checkpointing_enable" if hasattr(model, "activation_checkpointing_enable") else (
            "gradient_checkpointing_enable"
        )  # fmt: skip
        getattr(model, name)()
        model.train()
    with mpiattn.torch.shard(model, comm, "ring", layout=layout) as sharded:
        assert same(trained(sharded, ids, ids), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padding_on_the_right_is_not_seen(comm: MPI.Intracomm, family: str) -> None:
    # Without a mask function transformers hands on no mask, and padding would be attended to.
    ids, model, lengths = tokens(3, 23), tiny(family), [23, 9, 14]
    mask = torch.stack([torch.arange(23) < length for length in lengths]).long()
    labels = ids.masked_fill(mask == 0, -100)
    expected = in_one_process(
        model, [row[:n] for row, n in zip(ids, lengths, strict=True)],
        [row[:n] for row, n in zip(labels, lengths, strict=True)],
    )  # fmt: skip
    with mpiattn.torch.shard(model, comm) as sharded:
        assert same(trained(sharded, ids, labels, mask), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents_do_not_see_each_other(comm: MPI.Intracomm, padded: bool) -> None:
    # Each row has documents of its own; as the collator makes them, the first token of each is no target.
    rows, model = [[5, 11, 7], [16, 7], [1, 22]], tiny("gemma2")
    ids = tokens(3, 24 if padded else 23)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    positions = torch.nn.functional.pad(positions, (0, int(padded)))
    documents = [part for row, lengths in zip(ids, rows, strict=True) for part in row[:23].split(lengths)]
    expected = in_one_process(model, documents, documents)
    labels = ids.masked_fill(positions == 0, -100)
    mask = (torch.arange(ids.shape[1]) < 23).long().expand(3, -1)
    labels = labels.masked_fill(mask == 0, -100)
    with mpiattn.torch.shard(model, comm) as sharded:
        assert same(trained(sharded, ids, labels, mask if padded else None, positions), expected)


def test_many_packed_batches_one_after_the_other(comm: MPI.Intracomm) -> None:
    # Each has a mask of its own; what is built for it is freed again.
    from mpiattn.torch.shard import KEPT

    ids, model = tokens(1, 23), tiny("llama")
    with mpiattn.torch.shard(model, comm, "ring") as sharded:
        for length in range(1, 23):
            positions = torch.cat([torch.arange(length), torch.arange(23 - length)])[None]
            trained(sharded, ids, ids, position_ids=positions)
            assert len(sharded.attentions) <= KEPT


def test_the_mean_is_over_all_targets(comm: MPI.Intracomm) -> None:
    # One rank has nearly all of them: a mean of the ranks' means would be another number.
    ids, model = tokens(1, 29), tiny("llama")
    labels = ids.clone()
    labels[:, 6:] = -100
    labels[:, 28] = ids[:, 28]
    expected = in_one_process(model, list(ids), list(labels))
    with mpiattn.torch.shard(model, comm, layout="contiguous") as sharded:
        assert same(trained(sharded, ids, labels), expected)


def test_groups_of_ranks_with_batches_of_their_own(comm: MPI.Intracomm) -> None:
    data = 2 if comm.Get_size() % 2 == 0 else comm.Get_size()
    batches, model = tokens(data, 2, 17), tiny("llama")
    labels = batches.clone()
    labels[0, :, :9] = -100  # fewer targets than the other groups
    rows = batches.flatten(0, 1), labels.flatten(0, 1)
    expected = in_one_process(model, list(rows[0]), list(rows[1]))
    with mpiattn.torch.shard(model, comm, data=data) as sharded:
        assert same(trained(sharded, batches[sharded.group], labels[sharded.group]), expected)


def test_a_sequence_shorter_than_the_ranks(comm: MPI.Intracomm) -> None:
    ids, model = tokens(1, 2), tiny("llama")
    expected = in_one_process(model, list(ids), list(ids))
    with mpiattn.torch.shard(model, comm, "ring") as sharded:
        # The one query that has a target sees one key: Q and K have no gradient but rounding errors.
        assert same(trained(sharded, ids, ids), expected, small=1e-2)


def test_logits_and_their_places(comm: MPI.Intracomm) -> None:
    ids, model = tokens(2, 23), tiny("llama")
    with torch.no_grad():
        expected = model(input_ids=ids).logits.flatten(0, 1)
        with mpiattn.torch.shard(model, comm) as sharded:
            out = sharded(ids)
            assert out.loss is None and out.logits.shape[:2] == out.places.shape
            assert torch.allclose(out.logits.flatten(0, 1), expected[out.places.flatten()], atol=1e-4)
            short = sharded(ids, attention_mask=(torch.arange(23) < 20).long().expand(2, -1))
            assert torch.allclose(short.logits.flatten(0, 1), expected[short.places.flatten()], atol=1e-4)
            computed = sorted(place for places in comm.allgather(short.places.flatten().tolist()) for place in places)
            assert computed == [*range(20), *range(23, 43)]  # no padding


def test_dropout_does_not_depend_on_the_ranks(comm: MPI.Intracomm) -> None:
    results = []
    for ranks in (comm, MPI.COMM_SELF):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_dropout=0.3))
        ids = tokens(1, 23)
        with mpiattn.torch.shard(seeded(model), ranks, "ring") as sharded:
            model.train()
            torch.manual_seed(7 + (comm.Get_rank() if ranks is comm else 0))
            results.append(trained(sharded, ids, ids))
    assert same(*results)


def test_no_two_layers_of_a_step_drop_the_same(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpiattn.torch import call

    seeds: list[int] = []

    def noted(rate: float, seed: int) -> mpiattn.Dropout:
        seeds.append(seed)
        return mpiattn.Dropout(rate, seed)

    monkeypatch.setattr(call, "Dropout", noted)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_dropout=0.3)).train()
    groups = comm.Get_size()
    with mpiattn.torch.shard(model, comm, data=groups) as sharded:
        sharded(tokens(1, 9))
    assert len({seed for own in comm.allgather(seeds) for seed in own}) == groups * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-oss"])
def test_autocast_is_that_of_one_process(comm: MPI.Intracomm, family: str) -> None:
    ids, model = tokens(2, 29), tiny(family)
    model.set_attn_implementation("eager" if family == "gpt-oss" else "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with mpiattn.torch.shard(model, comm) as sharded:
        with torch.autocast("cpu", torch.bfloat16):
            own: Any = sharded(ids, ids).loss
            assert len(set(map(str, comm.allgather(sharded.generate(ids, max_new_tokens=3).tolist())))) == 1
        own.backward()
        sharded.sum_gradients()
    assert abs(float(own.detach()) - float(loss.detach())) < 1e-2 * float(loss.detach())
    assert worst(gradients(model), expected) < 0.1


def seeded(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("wrong", ["labels", "input_ids", "left", "holes", "documents in the mask", "device", "none"])
def test_a_wrong_batch_is_one_error_on_all_ranks(comm: MPI.Intracomm, wrong: str) -> None:
    ids = tokens(2, 13)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    here = comm.Get_rank() == comm.Get_size() - 1
    words = {
        "labels": "labels on rank", "input_ids": "input_ids on rank", "left": "padding_side = 'right'",
        "holes": "padding_side = 'right'", "documents in the mask": "position_ids that start again",
        "device": "on meta, the model on cpu", "none": "all labels are -100",
    }  # fmt: skip
    if wrong in batch:
        if comm.Get_size() == 1:
            pytest.skip("there is no other rank")
        batch[wrong] = ids + here
    elif wrong == "device":
        batch["labels"] = ids.to("meta") if here else ids
    elif wrong == "none":
        batch["labels"] = torch.full_like(ids, -100)
    else:
        places = {"left": slice(0, 2), "holes": slice(5, 7), "documents in the mask": slice(8, 13)}
        batch["attention_mask"][:, places[wrong]] = 2 if wrong.startswith("doc") else 0
        batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100)
    with mpiattn.torch.shard(tiny("llama"), comm) as sharded:
        with pytest.raises(mpiattn.InputError, match=words[wrong]) as raised:
            sharded(**batch)
        assert len(set(comm.allgather(str(raised.value)))) == 1
        sharded(ids, ids)  # and goes on


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("input_ids", -1, "input_ids has -1: the model has tokens 0 to"),
        ("input_ids", 10**6, "input_ids has 1000000: the model has tokens 0 to"),
        ("labels", -1, "labels has -1: the model has tokens 0 to .*, and -100 of what is no target"),
        ("labels", 10**6, "labels has 1000000"),
    ],
)
def test_tokens_of_another_model(comm: MPI.Intracomm, name: str, number: int, words: str) -> None:
    """One token of them all, which one rank alone would compute; of what is padding it does not matter."""
    ids = tokens(2, 13)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    batch[name] = ids.clone()
    batch[name][1, 12] = number
    with mpiattn.torch.shard(tiny("llama"), comm) as sharded:
        with pytest.raises(mpiattn.InputError, match=words):
            sharded(**batch)
        if name == "input_ids":
            with pytest.raises(mpiattn.InputError, match=words):
                sharded.generate(batch[name], max_new_tokens=2)
            kept = torch.ones_like(ids)
            kept[1, 12] = 0
            sharded(batch[name], ids.masked_fill(kept == 0, -100), kept)
        with pytest.raises(mpiattn.InputError, match=r"input_ids must be of torch\.int64, got torch\.float32"):
            sharded(ids.float())
        sharded(ids, ids)


def test_what_cannot_be_split_is_named(comm: MPI.Intracomm) -> None:
    def refused(model: Any, words: str, **options: Any) -> None:
        with pytest.raises(mpiattn.InputError, match=words):
            mpiattn.torch.shard(model, comm, **options)

    llama = tiny("llama")
    refused(llama, "does not share out tokens", algorithm="decode")
    refused(llama, "do not make", data=comm.Get_size() + 1)
    for groups in ("1", 1.0, 0, None):
        refused(llama, "do not make", data=groups)
    refused(torch.nn.Linear(2, 2), "a model is one of transformers, got Linear")
    refused(llama, "unknown layout", layout="spiral")
    refused(llama, "does not hold", rows=comm.Get_size() + 1)
    refused(llama, "RingAttention has no option 'rows': choose from layout, partials, kernel", algorithm="ring", rows=1)
    refused(llama, "MeshAttention has no option 'kernal': did you mean kernel", kernal="numpy")
    refused(llama, "HybridAttention has no option 'ulyses': did you mean ulysses", algorithm="hybrid", ulyses=1)
    for option in ({"mask": mpiattn.Full()}, {"scale": 3.0}, {"softcap": 5.0}):  # each gave another loss, unseen
        refused(llama, f"{next(iter(option))} is set by the model", **option)
    t5 = hf.T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    refused(hf.T5ForConditionalGeneration(t5), "T5ForConditionalGeneration can't be split.*position biases")
    bloom = hf.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)
    refused(hf.BloomForCausalLM(bloom), "BloomForCausalLM can't be split")
    mamba = hf.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    refused(hf.MambaForCausalLM(mamba), "MambaForCausalLM can't be split.*convolutions")


def test_another_mask_than_a_causal_one_is_refused(comm: MPI.Intracomm) -> None:
    model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, **ALTERNATING, use_bidirectional_attention=True))
    model.config.is_causal = False
    with mpiattn.torch.shard(model, comm) as sharded, pytest.raises(mpiattn.InputError, match="a mask of its own"):
        sharded(tokens(1, 13))


def test_layers_of_a_batch_agree_once(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpiattn.algorithms.agreement import Agreement

    asked = []
    describe, ids = Agreement.describe, tokens(1, 23)

    def counted(self: Agreement, *values: Any, **numbers: Any) -> Any:
        known = list(self.told.values())
        result = describe(self, *values, **numbers)
        asked.append(not any(result is answer for answer in known))
        return result

    monkeypatch.setattr(Agreement, "describe", counted)
    with mpiattn.torch.shard(tiny("llama"), comm) as sharded:
        for _ in range(2):
            asked.clear()
            trained(sharded, ids, ids)
            assert asked == [True, False, True, False]  # two layers, forward and backward
    with mpiattn.RingAttention(comm, mask=mpiattn.Causal()) as attention:
        mine = torch.as_tensor(attention.positions(23))
        q = torch.ones(1, 2, len(mine), 4)
        asked.clear()
        for _ in range(2):
            mpiattn.torch.attention(attention, q, q, q)
        assert asked == [True, True]  # a bare call always agrees


def test_two_batches_whose_gradients_come_together(comm: MPI.Intracomm) -> None:
    # Rank 0 has as many tokens of the one as of the other, the last rank has not.
    model = tiny("llama")
    pair = [tokens(1, comm.Get_size() * 4), tokens(1, comm.Get_size() * 4 + 1)]
    expected = [in_one_process(model, list(ids), list(ids)) for ids in pair]
    with mpiattn.torch.shard(model, comm, layout="contiguous") as sharded:
        losses: list[Any] = [sharded(ids, ids).loss for ids in pair]
        (losses[0] + losses[1]).backward()
        sharded.sum_gradients()
    total = [a + b for a, b in zip(expected[0][1], expected[1][1], strict=True)]
    assert worst(gradients(model), total) < TOLERANCE


def test_micro_batches_are_added_up_once(comm: MPI.Intracomm) -> None:
    """By a call after each of them, the first would count once for each rank: a silent mistake that the limits list."""
    ids, model = tokens(2, 29), tiny("llama")
    expected = in_one_process(model, list(ids), list(ids))
    with mpiattn.torch.shard(model, comm) as sharded:
        for each in (False, True):
            for row in ids.split(1):
                loss: Any = sharded(row, row).loss
                (loss / 2).backward()
                if each:
                    sharded.sum_gradients()
            if not each:
                sharded.sum_gradients()
            right = worst(gradients(model), expected[1]) < TOLERANCE
            assert right is (not each or comm.Get_size() == 1)
            model.zero_grad()


def test_a_model_that_is_not_sharded_says_so(comm: MPI.Intracomm) -> None:
    model = hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**SIZES), attn_implementation="mpiattn")
    with pytest.raises(mpiattn.InputError, match="is called through"):
        model(input_ids=tokens(1, 5), attention_mask=torch.ones(1, 5))


def test_sharding_again_takes_no_more_communicators(comm: MPI.Intracomm) -> None:
    kept = []
    for _ in range(2):
        with mpiattn.torch.shard(tiny("llama"), comm) as sharded:
            kept.append((sharded.comm, sharded.sequence))
    assert kept[0][0] is kept[1][0] and kept[0][1] is kept[1][1]
