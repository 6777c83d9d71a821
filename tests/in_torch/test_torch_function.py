"""Attention of tensors: gradients, dtypes, and all that autograd does with a function."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from mpi4py import MPI
from one_process import Cut, Join, causal, error, inputs, share, textbook, whole
from torch.utils.checkpoint import checkpoint

import mpiattn
import mpiattn.torch

NAMES = ["dense", "ring", "double_ring", "shared_ring", "mesh", "mesh_gathered", "allgather", "ulysses", "hybrid"]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def built(comm: MPI.Intracomm, name: str = "ring", **options: Any) -> Any:
    return mpiattn.ALGORITHMS[name](comm, mask=mpiattn.Causal(), **options)


def leaves(attention: Any, tensors: Any) -> Any:
    return [tensor.clone().requires_grad_() for tensor in share(attention, *tensors)]


@pytest.mark.mpi
@pytest.mark.parametrize("name", NAMES)
def test_out_and_gradients_are_those_of_one_process(comm: MPI.Intracomm, name: str) -> None:
    *qkv, d_out = inputs(tokens=23)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64)
    expected: Any = [tensor.clone().requires_grad_() for tensor in (*qkv, sinks)]
    out = textbook(expected[:3], causal(23), expected[3])
    out.backward(d_out)
    with built(comm, name) as attention:
        q, k, v = leaves(attention, qkv)
        own_sinks = sinks.clone().requires_grad_()
        mine = mpiattn.torch.attention(attention, q, k, v, own_sinks)
        mine.backward(share(attention, d_out)[0])
        assert error(whole(attention, mine, 23), out) < 1e-12
        for tensor, other in zip((q, k, v), expected, strict=False):
            assert tensor.grad is not None and other.grad is not None
            assert error(whole(attention, tensor.grad, 23), other.grad) < 1e-12
        assert own_sinks.grad is not None and expected[3].grad is not None
        assert error(torch.as_tensor(comm.allreduce(own_sinks.grad.numpy())), expected[3].grad) < 1e-12


@pytest.mark.mpi
def test_gradcheck(comm: MPI.Intracomm) -> None:
    *qkv, _ = inputs(tokens=5, heads=(2, 1))
    with built(comm) as attention:

        def everywhere(*tensors: torch.Tensor) -> torch.Tensor:
            q, k, v = (Cut.apply(attention, tensor) for tensor in tensors)
            result: torch.Tensor = Join.apply(attention, mpiattn.torch.attention(attention, q, k, v), 5)
            return result

        assert torch.autograd.gradcheck(everywhere, [tensor.requires_grad_() for tensor in qkv])


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes(comm: MPI.Intracomm, dtype: torch.dtype) -> None:
    *qkv, d_out = inputs(tokens=23)
    expected: Any = [tensor.to(dtype).double().clone().requires_grad_() for tensor in qkv]
    textbook(expected, causal(23)).backward(d_out.to(dtype).double())
    with built(comm) as attention:
        own = leaves(attention, [tensor.to(dtype) for tensor in qkv])
        out = mpiattn.torch.attention(attention, *own)
        out.backward(share(attention, d_out.to(dtype))[0])
        assert out.dtype == dtype
        for tensor, other in zip(own, expected, strict=True):
            assert tensor.grad is not None and other.grad is not None and tensor.grad.dtype == dtype
            assert error(whole(attention, tensor.grad, 23), other.grad) < TOLERANCES[dtype]


@pytest.mark.mpi
def test_tensors_that_lie_otherwise_in_memory(comm: MPI.Intracomm) -> None:
    # As models make them: heads and tokens transposed; K/V heads and the gradient of a sum expanded.
    q, k, v, _ = inputs(tokens=23)
    with built(comm) as attention:
        mine = share(attention, q, k, v)
        straight = [tensor.clone().requires_grad_() for tensor in (mine[0], mine[1][:, :1].repeat(1, 2, 1, 1), mine[2])]
        mpiattn.torch.attention(attention, *straight).sum().backward()
        turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2).detach() for tensor in mine]
        turned[1] = mine[1][:, :1].expand(-1, 2, -1, -1)
        assert not any(tensor.is_contiguous() for tensor in turned[:2]) or not mine[0].numel()
        other = [tensor.requires_grad_() for tensor in turned]
        mpiattn.torch.attention(attention, *other).sum().backward()
        for a, b in zip(other, straight, strict=True):
            assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


@pytest.mark.mpi
def test_a_cpu_tensor_is_not_copied(comm: MPI.Intracomm) -> None:
    from mpiattn.torch.arrays import to_array, to_tensor

    for dtype in TOLERANCES:
        tensor = torch.ones(2, 3, dtype=dtype, requires_grad=True)
        array = to_array(tensor)
        assert array.__array_interface__["data"][0] == tensor.data_ptr() == to_tensor(array).data_ptr()
        assert to_tensor(array).dtype == dtype


@pytest.mark.mpi
def test_no_grad_keeps_nothing(comm: MPI.Intracomm) -> None:
    with built(comm) as attention, torch.no_grad():
        out = mpiattn.torch.attention(attention, *leaves(attention, inputs(tokens=9)[:3]))
        assert out.grad_fn is None


@pytest.mark.mpi
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_several_layers_on_one_object(comm: MPI.Intracomm, reentrant: bool) -> None:
    q, k, _, _ = inputs(tokens=23, heads=(2, 2))
    with built(comm, "mesh") as attention:
        gradients = []
        for wrapped in (False, True):
            x, y = leaves(attention, [q, k])
            for layer in range(3):
                arguments = (attention, x, y * (layer + 1), x - y)
                if wrapped:
                    x = checkpoint(mpiattn.torch.attention, *arguments, use_reentrant=reentrant)
                else:
                    x = mpiattn.torch.attention(*arguments)
            x.square().sum().backward()
            gradients.append(y.grad)
        assert gradients[0] is not None and gradients[1] is not None and torch.equal(*gradients)


@pytest.mark.mpi
def test_checkpointing_gives_the_memory_back(comm: MPI.Intracomm) -> None:
    # What is kept for backward is kept by torch, which can drop it: nothing else holds the tensors.
    kept = []
    with built(comm) as attention:
        own = leaves(attention, inputs(tokens=9)[:3])
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
            out = mpiattn.torch.attention(attention, *own)
        assert len(kept) == 5  # q, k, v, out, lse
        held = [part for part in vars(out.grad_fn)["rest"] if hasattr(part, "shape")]
        assert not held


@pytest.mark.mpi
def test_backward_twice(comm: MPI.Intracomm) -> None:
    with built(comm) as attention:
        own = leaves(attention, inputs(tokens=23)[:3])
        out = mpiattn.torch.attention(attention, *own).sum()
        first = torch.autograd.grad(out, own, retain_graph=True)
        again = torch.autograd.grad(out, own)
        assert all(map(torch.equal, first, again))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, own)


@pytest.mark.mpi
def test_a_tensor_written_to_before_backward_is_noticed(comm: MPI.Intracomm) -> None:
    with built(comm) as attention:
        q, k, v = leaves(attention, inputs(tokens=23)[:3])
        k = k * 1
        out = mpiattn.torch.attention(attention, q, k, v)
        k.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.mpi
def test_layers_take_turns_on_one_object(comm: MPI.Intracomm) -> None:
    # Backward meets two layers of other sizes, the later one first.
    with built(comm) as attention:
        small, large = (leaves(attention, inputs(tokens)[:3]) for tokens in (11, 23))
        alone = [torch.autograd.grad(mpiattn.torch.attention(attention, *own).sum(), own) for own in (small, large)]
        outs = [mpiattn.torch.attention(attention, *own).sum() for own in (small, large)]
        together = torch.autograd.grad(outs[0] + outs[1], [*small, *large])
        assert all(map(torch.equal, together, [*alone[0], *alone[1]]))


@pytest.mark.mpi
def test_dropout(comm: MPI.Intracomm) -> None:
    *qkv, _ = inputs(tokens=23)
    drop = mpiattn.Dropout(0.5, 7)
    alone = mpiattn.DenseAttention(MPI.COMM_SELF, mask=mpiattn.Causal(), layout="contiguous")
    expected: Any = [tensor.clone().requires_grad_() for tensor in qkv]
    q, k, v = expected
    mpiattn.torch.attention(alone, q, k, v, dropout=drop).square().sum().backward()
    with built(comm) as attention:
        q, k, v = leaves(attention, qkv)
        mpiattn.torch.attention(attention, q, k, v, dropout=drop).square().sum().backward()
        for tensor, other in zip((q, k, v), expected, strict=True):
            assert tensor.grad is not None and other.grad is not None
            assert error(whole(attention, tensor.grad, 23), other.grad) < 1e-12
    alone.free()


@pytest.mark.mpi
def test_a_tensor_written_to_on_one_rank_is_an_error_on_all(comm: MPI.Intracomm) -> None:
    """Torch's own on that rank; the others do not wait for it."""
    with built(comm) as attention:
        q, k, v = leaves(attention, inputs(tokens=23)[:3])
        k = k.detach().clone()
        out = mpiattn.torch.attention(attention, q, k, v)
        last = comm.size - 1
        if comm.rank == last:
            k.mul_(2)
        with pytest.raises((RuntimeError, mpiattn.InputError)) as raised:
            out.sum().backward()
        words = "modified by an inplace operation" if comm.rank == last else f"on rank {last}, saved is not what"
        assert words in str(raised.value)


@pytest.mark.mpi
def test_second_derivatives_are_refused(comm: MPI.Intracomm) -> None:
    """They would be 0, without a word, as in the gradient of a penalty on gradients."""
    with built(comm) as attention:
        q, k, v = leaves(attention, inputs(tokens=23)[:3])
        out = mpiattn.torch.attention(attention, q, k, v)
        (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (out.sum() + gradient.square().sum()).backward()


@pytest.mark.mpi
def test_a_tensor_that_is_to_be_negated(comm: MPI.Intracomm) -> None:
    """As the imaginary part of a conjugate is."""
    with built(comm) as attention:
        q, k, v = leaves(attention, inputs(tokens=23)[:3])
        expected = mpiattn.torch.attention(attention, -q, k, v)
        assert torch.equal(mpiattn.torch.attention(attention, torch._neg_view(q), k, v), expected)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda k: k.detach().numpy(), "no tensor but ndarray: torch.as_tensor"),
        (lambda k: None, "no tensor but NoneType"),
        (lambda k: k.detach().to(torch.float8_e4m3fn), r"a tensor of torch\.float8_e4m3fn: tensor\.float\(\)"),
        (lambda k: k.detach().to("meta"), "a tensor on the device meta"),
        (lambda k: k.detach().to_sparse(), r"a tensor of the layout torch\.sparse_coo: tensor\.to_dense\(\)"),
    ],
)
def test_what_is_no_such_tensor(comm: MPI.Intracomm, wrong: Any, message: str) -> None:
    with built(comm) as attention:
        q, k, v = leaves(attention, inputs(tokens=23)[:3])
        k = wrong(k) if comm.rank == comm.size - 1 else k
        with pytest.raises(mpiattn.InputError, match=f"k on rank {comm.size - 1} is {message}"):
            mpiattn.torch.attention(attention, q, k, v)


@pytest.mark.mpi
@pytest.mark.parametrize("wrong", ["dtype", "meta", "array", "shape", "sinks"])
def test_bad_input_is_one_error_on_all_ranks(comm: MPI.Intracomm, wrong: str) -> None:
    here = comm.Get_rank() == comm.Get_size() - 1
    with built(comm) as attention:
        q, k, v = leaves(attention, inputs(tokens=23)[:3])
        sinks = torch.zeros(4, dtype=torch.float64)
        bad: dict[str, Any] = {
            "dtype": k.float(), "meta": k.to("meta"), "array": k.detach().numpy(), "shape": k[:, :, :, :3]
        }  # fmt: skip
        k = bad.get(wrong, k) if here else k
        sinks = sinks[:3] if here and wrong == "sinks" else sinks
        with pytest.raises(mpiattn.InputError) as raised:
            mpiattn.torch.attention(attention, q, k, v, sinks)
        assert len(set(comm.allgather(str(raised.value)))) == 1


def test_an_algorithm_that_is_not_built() -> None:
    wrong: Any = mpiattn.RingAttention
    with pytest.raises(mpiattn.InputError, match="attention must be an algorithm that is built"):
        mpiattn.torch.attention(wrong, *inputs(tokens=4)[:3])


def test_mpi_is_loaded_before_torch() -> None:
    code = "import mpiattn.torch, sys; print([name for name in sys.modules if name in ('mpi4py.MPI', 'torch')][0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "mpi4py.MPI\n"


def test_nothing_imports_torch_unless_asked() -> None:
    code = "import mpiattn, mpiattn.commands.cli, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
