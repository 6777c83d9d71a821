"""The benchmark of training in torch: every contender has the loss and the gradients of one process."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from one_process import causal, textbook, worst
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mpiattn
from mpiattn.algorithms.spelling import Asked
from mpiattn.commands import cli
from mpiattn.commands.bench.torch_contenders import Contender, contenders, table
from mpiattn.commands.bench.torch_llama import Sizes
from mpiattn.commands.bench.torch_shares import Share
from mpiattn.commands.bench.torch_step import Task, measure, meet, tasks

TOKENS = 48  # a multiple of twice the ranks, as torch's context parallelism wants it
SIZES = Sizes(layers=2, hidden=32, heads=4, kv_heads=2, vocabulary=61)
ASKED: list[Asked] = [(name, {}) for name in ("ring", "mesh", "ulysses")]


@pytest.fixture
def torch_on_cpus(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch's context parallelism, which has attention for GPUs alone, call torch's attention for CPUs."""
    ring = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._attention")
    tensor, aten = torch.distributed.tensor, torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def handler(op: Any, args: Any, others: Any) -> Any:
        mesh, group = args[0].device_mesh, args[0].device_mesh.get_group()
        given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | others
        own = {name: x.to_local() if isinstance(x, tensor.DTensor) else x for name, x in given.items()}
        if op == forward:
            results = ring._templated_ring_attention(group, 2, forward, **own)
        else:
            results = ring._templated_ring_attention_backward(group, 2, backward, grad_out_name="grad_out", **own)
        return tuple(tensor.DTensor.from_local(part, mesh, [tensor.Shard(2)]) for part in results)

    for op in (forward, backward):
        monkeypatch.setitem(ring.custom_ops, op, handler)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def task_of(comm: MPI.Intracomm, recompute: bool = False) -> Task:
    return next(tasks(comm, np, SIZES, "float64", [TOKENS], recompute))


def everyone(task: Task, with_torch: bool = True) -> list[Contender]:
    def build(asked: Asked) -> mpiattn.Attention:
        return mpiattn.ALGORITHMS[asked[0]](task.comm, mask=mpiattn.Causal())

    return contenders(task.comm, task.model, task.tokens, task.ids.device, ASKED, build, with_torch)


def gradients(task: Task) -> list[Tensor]:
    return [weight.grad.clone() for weight in task.model.parameters() if weight.grad is not None]


def in_one_process() -> Share:
    """Return the whole sequence, with the textbook's attention."""
    return Share(torch.arange(TOKENS), lambda *qkv: textbook(qkv, causal(TOKENS)), lambda: None)


def test_the_model_is_llama() -> None:
    task, names = task_of(MPI.COMM_SELF), {"blocks": "model.layers", "embed": "model.embed_tokens", "head": "lm_head"}
    names |= {"norm": "model.norm", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {f"W_{name}": f"self_attn.{name}_proj" for name in "qkvo"}
    names |= {f"W_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    sizes = {"hidden_size": 32, "intermediate_size": SIZES.mlp, "num_hidden_layers": 2, "vocab_size": 61}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)
    theirs = LlamaForCausalLM(config).double()
    paths = [".".join(names.get(part, part) for part in path.split(".")) for path in task.model.state_dict()]
    theirs.load_state_dict(dict(zip(paths, task.model.state_dict().values(), strict=True)))
    expected = theirs(input_ids=task.ids[None], labels=task.ids[None], use_cache=False).loss
    expected.backward()
    off = float(task.passes(in_one_process())) / float(expected.detach()) - 1
    assert abs(off) < 1e-6  # their angles are float32
    weights = dict(theirs.named_parameters())
    off = worst(gradients(task), [weights[path].grad for path in paths])
    assert off < 1e-4


@pytest.mark.mpi
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_of_one_process(comm: MPI.Intracomm, torch_on_cpus: None, recompute: bool) -> None:
    task = task_of(comm, recompute)
    loss, expected = float(task.passes(in_one_process())), gradients(task)
    for one in everyone(task):
        with one.share() as share:
            own = float(task.passes(share))
            share.sum_gradients()
        tolerance = 2e-6 if one.name.startswith("torch context_parallel") else 1e-12  # it merges in float32
        assert comm.allreduce(own) == pytest.approx(loss, rel=tolerance), one.name
        off = worst(gradients(task), expected)
        assert off < tolerance, one.name


@pytest.mark.mpi
@pytest.mark.gpu
def test_loss_and_gradients_on_gpus(comm: MPI.Intracomm) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks may share a GPU, which NCCL refuses
        cupy = mpiattn.use_gpu(comm)
    alone = comm.Get_size() <= torch.cuda.device_count()
    task = next(tasks(comm, cupy, Sizes(2, 256, 4, 4, 61), "bfloat16", [768], True))
    tokens = torch.arange(768, device=task.ids.device)
    dense = Share(tokens, lambda *qkv: textbook(qkv, causal(768).to(tokens.device)), lambda: None)
    model = copy.deepcopy(task.model).double()
    exact = dataclasses.replace(task, model=model, optimizer=torch.optim.SGD(model.parameters()))
    loss, expected = float(exact.passes(dense)), gradients(exact)
    for one in everyone(task, with_torch=alone):
        with one.share() as share:
            own = float(task.passes(share))
            share.sum_gradients()
        off = worst(gradients(task), expected)
        assert comm.allreduce(own) == pytest.approx(loss, rel=1e-2) and off < 0.1, one.name
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.mpi
def test_turns(comm: MPI.Intracomm, torch_on_cpus: None) -> None:
    task = task_of(comm)
    entered, weights = everyone(task), [weight.clone() for weight in task.model.parameters()]
    for one in entered:
        measure(task, one)
    assert all(torch.equal(*pair) for pair in zip(weights, task.model.parameters(), strict=True))
    for one in entered:
        (row,) = one.rounds
        assert row["loss"] == pytest.approx(entered[0].rounds[0]["loss"], rel=1e-6)
        assert 0 < row["passes"] < row["seconds"] and 0 < row["gradients"] < row["seconds"]
        assert bool(one.waiting) == (comm.Get_size() > 1 and not one.name.startswith("torch"))
    lines = table(entered, TOKENS / comm.Get_size()).splitlines()
    assert [one.name for one in entered] == [line.split("  ")[0] for line in lines[-len(entered) :]]


@pytest.mark.mpi
@pytest.mark.parametrize("everywhere", [True, False])
def test_out_of_memory_ends_one_contender(comm: MPI.Intracomm, everywhere: bool) -> None:
    @contextlib.contextmanager
    def large() -> Iterator[Share]:
        with ring.share() as share:
            yield share
        if everywhere or comm.Get_rank() == comm.Get_size() - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    task = task_of(comm)
    ring = everyone(task)[0]
    full = Contender("large", large)
    for one in (full, ring, full):
        measure(task, one)
    first = 0 if everywhere else comm.Get_size() - 1
    assert full.failed.startswith(f"rank {first}: OutOfMemoryError: CUDA out") and not full.rounds
    assert len(ring.rounds) == 1 and not ring.failed
    text = table([full, ring], TOKENS / comm.Get_size())
    assert "large  out of memory" in text and f"large: {full.failed}" in text


@pytest.mark.mpi
def test_out_of_memory_where_the_others_wait_ends_the_job(comm: MPI.Intracomm) -> None:
    if comm.Get_size() > 1 and comm.Get_rank() == 0:
        with pytest.raises(MemoryError, match="full"):
            meet(comm, MemoryError("full"), patience=0.05)
    else:
        time.sleep(0.2)
        meet(comm)


@pytest.mark.mpi
def test_other_errors_are_raised(comm: MPI.Intracomm) -> None:
    @contextlib.contextmanager
    def wrong() -> Iterator[Share]:
        raise ValueError("no such thing")
        yield

    with pytest.raises(ValueError, match="no such thing"):
        measure(task_of(comm), Contender("wrong", wrong))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--hidden 36 --heads 6 --kv-heads 4", "--heads 6 must be a multiple of --kv-heads 4"),
        ("--hidden 36 --heads 4", "--hidden 36 must be a multiple of 2 x --heads 4"),
        ("--rounds 0", "no number from 1 on"),
        ("--algorithms decode", "decode"),
        ("--dtype int8", "unknown dtype 'int8'"),
        ("--no-torch", "does nothing on CPUs"),
        ("--json no/such/folder.json", "no such folder"),
    ],
)
def test_bad_input(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "torch", "--arrays", "numpy", *words.split()]) == 2
    assert text in capsys.readouterr().err
