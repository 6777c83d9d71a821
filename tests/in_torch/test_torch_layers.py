"""Layers over the ranks: equal to the same layer in one process, weights' gradients and dropout included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mpi4py import MPI
from one_process import causal, error, textbook, worst
from torch import Tensor, nn

import mpiattn
import mpiattn.torch

pytestmark = pytest.mark.mpi
TOKENS = 19


def textbook_layer(layer: Any, x: Tensor, allowed: Tensor) -> Tensor:
    heads = layer.num_heads, layer.num_kv_heads, layer.num_kv_heads
    q, k, v = (
        project(x).unflatten(-1, (count, -1)).transpose(1, 2)
        for project, count in zip((layer.W_q, layer.W_k, layer.W_v), heads, strict=True)
    )
    result: Tensor = layer.W_o(textbook((q, k, v), allowed).transpose(1, 2).flatten(2))
    return result


def gradients(module: nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for weight in module.parameters() if weight.grad is not None]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("mask", [None, mpiattn.Causal()], ids=str)
@pytest.mark.parametrize("row", [True, False])
def test_mesh_attention_is_the_layer_of_one_process(comm: MPI.Intracomm, mask: Any, row: bool) -> None:
    torch.manual_seed(comm.Get_rank())  # which does not matter: all ranks have the weights of rank 0
    shape = (1, comm.Get_size()) if row else (comm.Get_size(), 1)
    layer = mpiattn.torch.MeshAttention(24, 4, shape, comm=comm, num_kv_heads=2, mask=mask).double()
    parallel = mpiattn.torch.SequenceParallel(layer, comm)
    x, target = random(2, TOKENS, 24), random(2, TOKENS, 24)
    everywhere, alone = x.clone().requires_grad_(), copy_of(layer)
    allowed = causal(TOKENS) if mask else torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    expected = textbook_layer(alone, everywhere, allowed)
    (expected - target).square().sum().backward()

    root = comm.Get_rank() == 0
    own = x.clone().requires_grad_()
    out = parallel(own if root else None)
    loss = (out - target).square().sum() if root else out.sum()
    loss.backward()
    parallel.sum_gradients()
    assert out.shape == ((2, TOKENS, 24) if root else (2, 0, 24))
    if root:
        assert error(out, expected) < 1e-12
        assert own.grad is not None and everywhere.grad is not None and error(own.grad, everywhere.grad) < 1e-12
    assert worst(gradients(layer), gradients(alone)) < 1e-12


def copy_of(layer: Any) -> Any:
    """Return a layer's projections alone, with weights of their own."""
    alone = nn.Module()
    for name in ("W_q", "W_k", "W_v", "W_o"):
        setattr(alone, name, copy.deepcopy(getattr(layer, name)))
    alone.num_heads, alone.num_kv_heads = layer.num_heads, layer.num_kv_heads
    return alone


def test_any_algorithm_and_several_layers(comm: MPI.Intracomm) -> None:
    # The input wants no gradient: nobody goes back through the scatter.
    with mpiattn.UlyssesAttention(comm, mask=mpiattn.Causal(), layout="striped") as attention:
        layers = [mpiattn.torch.AttentionLayer(24, 4, attention).double() for _ in range(2)]
        parallel = mpiattn.torch.SequenceParallel(nn.Sequential(layers[0], nn.GELU(), layers[1]), comm)
        assert parallel.layout == "striped"
        x, alone = random(1, TOKENS, 24), [copy_of(layer) for layer in layers]
        hidden = nn.functional.gelu(textbook_layer(alone[0], x, causal(TOKENS)))
        textbook_layer(alone[1], hidden, causal(TOKENS)).square().sum().backward()
        out = parallel(x if comm.Get_rank() == 0 else None)
        out.square().sum().backward()
        parallel.sum_gradients()
        expected = gradients(alone[0]) + gradients(alone[1])
        assert worst(gradients(parallel), expected) < 1e-12


def test_dropout_does_not_depend_on_the_ranks(comm: MPI.Intracomm) -> None:
    outs = []
    for ranks in (comm, MPI.COMM_SELF):
        torch.manual_seed(3 + (comm.Get_rank() if ranks is comm else 0))
        layer = mpiattn.torch.MeshAttention(24, 4, comm=ranks, dropout=0.4, mask=mpiattn.Causal()).double()
        parallel = mpiattn.torch.SequenceParallel(layer, ranks)
        x = random(2, TOKENS, 24)
        outs.append([parallel(x if ranks.Get_rank() == 0 else None) for _ in range(2)])
        assert not torch.equal(*outs[-1]) or comm.Get_rank()  # each call drops others
        layer.eval()
        outs[-1].append(parallel(x if ranks.Get_rank() == 0 else None))
    if comm.Get_rank() == 0:
        assert all(error(a, b) < 1e-12 for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_added_up_in_float32(comm: MPI.Intracomm, dtype: torch.dtype) -> None:
    # mpi4py takes no bfloat16, and sends a tensor that is not contiguous as it lies in memory.
    module = nn.Linear(5, 3, dtype=dtype)
    unused = nn.Parameter(torch.zeros(2))
    module.unused = unused
    rank, n = comm.Get_rank(), comm.Get_size()
    module.weight.grad = (torch.arange(15.0).reshape(5, 3).t() * (rank + 1) + 2**-6).to(dtype)
    assert not module.weight.grad.is_contiguous()
    if rank == 0:
        assert module.bias is not None
        module.bias.grad = torch.full((3,), 2.0, dtype=dtype)  # no other rank has used it
    mpiattn.torch.sum_gradients(module, comm)
    parts = [(torch.arange(15.0).reshape(5, 3).t() * (r + 1) + 2**-6).to(dtype).float() for r in range(n)]
    assert torch.equal(module.weight.grad, torch.stack(parts).sum(0).to(dtype))
    assert module.bias.grad is not None and torch.equal(module.bias.grad, torch.full((3,), 2.0, dtype=dtype))
    assert unused.grad is None


def test_what_the_caller_waits_for_does_not_get_gradients(comm: MPI.Intracomm) -> None:
    pending = comm.Irecv(bytearray(4096), MPI.ANY_SOURCE, MPI.ANY_TAG)
    module = nn.Linear(5, 3)
    mpiattn.torch.broadcast(module, comm)
    module(torch.ones(2, 5)).sum().backward()
    mpiattn.torch.sum_gradients(module, comm)
    assert module.bias.grad is not None and torch.equal(module.bias.grad, torch.full((3,), 2.0 * comm.Get_size()))
    assert not pending.Test()
    pending.Cancel()
    pending.Wait()


@pytest.mark.parametrize("wrong", ["device", "d_model", "dtype", "numpy"])
def test_a_wrong_input_is_one_error_on_all_ranks(comm: MPI.Intracomm, wrong: str) -> None:
    layer = mpiattn.torch.MeshAttention(24, 4, comm=comm)
    x = torch.zeros(2, len(layer.attention.positions(TOKENS)), 24)
    bad: dict[str, Any] = {"device": x.to("meta"), "d_model": x[..., :3], "dtype": x.double(), "numpy": x.numpy()}
    x = bad[wrong] if comm.Get_rank() == comm.Get_size() - 1 else x
    words = {"device": r"move the layer with .to\('meta'\)", "dtype": "the weights torch.float32"}
    with pytest.raises(mpiattn.InputError, match=words.get(wrong, r"\(batch, tokens, 24\)")):
        layer(x)


@pytest.mark.parametrize("name", ["tensor_parallel", "decode"])
def test_an_attention_that_does_not_share_out_tokens_is_refused(comm: MPI.Intracomm, name: str) -> None:
    # Each rank would have all tokens, and the sum of the gradients count them once for each rank.
    with pytest.raises(mpiattn.InputError, match="does not share out tokens: take another algorithm"):
        mpiattn.torch.AttentionLayer(24, 4, mpiattn.ALGORITHMS[name](comm))


def test_what_is_no_attention_is_refused(comm: MPI.Intracomm) -> None:
    for wrong in (comm, "ring", mpiattn.RingAttention, None):
        with pytest.raises(mpiattn.InputError, match=r"such as mpiattn\.RingAttention\(comm\), got"):
            mpiattn.torch.AttentionLayer(24, 4, wrong)  # type: ignore[arg-type]


def test_an_attention_of_other_ranks_is_refused(comm: MPI.Intracomm) -> None:
    # It would see this rank's tokens alone, or take them for those of another place.
    def layer(of: Any) -> Any:
        return nn.Sequential(nn.Identity(), mpiattn.torch.MeshAttention(24, 4, comm=of))

    backwards, copied = comm.Split(0, -comm.Get_rank()), comm.Dup()
    if comm.Get_size() > 1:
        for of in (MPI.COMM_SELF, backwards):
            with pytest.raises(mpiattn.InputError, match="the attention of 1 was built with other ranks"):
                mpiattn.torch.SequenceParallel(layer(of), comm)
    mpiattn.torch.SequenceParallel(layer(copied), comm)
    ended = layer(comm)
    ended[1].attention.free()
    with pytest.raises(mpiattn.InputError, match="this attention has ended"):
        mpiattn.torch.SequenceParallel(ended, comm)
    backwards.Free()
    copied.Free()


def test_wrong_modules_are_one_error_on_all_ranks(comm: MPI.Intracomm) -> None:
    last = comm.Get_rank() == comm.Get_size() - 1
    with pytest.raises(mpiattn.InputError, match="multiple of num_heads"):
        mpiattn.torch.MeshAttention(24, 5, comm=comm)
    with pytest.raises(mpiattn.InputError, match="dropout rate"):
        mpiattn.torch.MeshAttention(24, 4, comm=comm, dropout=1.0)
    with pytest.raises(mpiattn.InputError, match="does not hold"):
        mpiattn.torch.MeshAttention(24, 4, (comm.Get_size() + 1, 1), comm=comm)
    with pytest.raises(mpiattn.InputError, match="no tensor"):
        mpiattn.torch.SequenceParallel(nn.Identity(), comm)(None)
    with pytest.raises(mpiattn.InputError, match="on meta, the module on cpu"):
        mpiattn.torch.SequenceParallel(nn.Linear(2, 2), comm)(torch.zeros(1, 3, 2, device="meta"))
    layers = [mpiattn.torch.MeshAttention(8, 2, comm=comm, layout=layout) for layout in ("striped", "zigzag")]
    with pytest.raises(mpiattn.InputError, match="striped and zigzag differ"):
        mpiattn.torch.SequenceParallel(nn.Sequential(*layers), comm)
    if comm.Get_size() > 1:
        with pytest.raises(mpiattn.InputError, match="same module on every rank"):
            mpiattn.torch.broadcast(nn.Linear(2, 3 if last else 4), comm)
        with pytest.raises(mpiattn.InputError, match=f"meta device on rank {comm.Get_size() - 1}, on a cpu device"):
            mpiattn.torch.sum_gradients(nn.Linear(2, 3, device="meta" if last else "cpu"), comm)
