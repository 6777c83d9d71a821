"""CUDA tensors: the same memory as CuPy's arrays, on torch's current stream, with the results of CPU tensors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from mpi4py import MPI
from one_process import causal, error, inputs, share, textbook, whole
from tiny_models import gradients, tiny, tokens

import mpiattn
import mpiattn.torch

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]


@pytest.fixture
def device(comm: MPI.Intracomm) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks may share a GPU
        cupy = mpiattn.use_gpu(comm)
    number = cupy.cuda.Device().id
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_out_and_gradients_on_a_stream_of_torch(
    comm: MPI.Intracomm, device: Any, dtype: torch.dtype, tolerance: float
) -> None:
    tensors = [tensor.to(dtype) for tensor in inputs(tokens=223)]
    tensors[2], tensors[3] = (torch.nn.functional.pad(tensor, (0, 2)) for tensor in tensors[2:])
    *qkv, d_out = tensors
    expected: Any = [tensor.double().requires_grad_() for tensor in qkv]
    out = textbook(expected, causal(223))
    out.backward(d_out.double())
    with mpiattn.RingAttention(comm, mask=mpiattn.Causal()) as attention, torch.cuda.stream(torch.cuda.Stream()):
        q, k, v = (tensor.to(device).requires_grad_() for tensor in share(attention, *qkv))
        torch.cuda._sleep(10**7)  # what is not queued behind it comes too early
        mine = mpiattn.torch.attention(attention, q * 1, k * 1, v * 1)
        (mine * share(attention, d_out)[0].to(device)).sum().backward()
        assert mine.device == device and mine.dtype == dtype
        assert error(whole(attention, mine.cpu(), 223), out) < tolerance
        for tensor, other in zip((q, k, v), expected, strict=True):
            assert error(whole(attention, tensor.grad.cpu(), 223), other.grad) < tolerance


def test_a_cuda_tensor_is_not_copied(comm: MPI.Intracomm, device: Any) -> None:
    from mpiattn.torch.arrays import to_array, to_tensor

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.ones(2, 3, dtype=dtype, device=device, requires_grad=True)
        array = to_array(tensor)
        assert array.data.ptr == tensor.data_ptr() == to_tensor(array).data_ptr()


def test_a_model_on_gpus(comm: MPI.Intracomm, device: Any) -> None:
    ids, model = tokens(2, 29), tiny("gemma2")
    model.set_attn_implementation("eager")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with mpiattn.torch.shard(model.to(device), comm) as sharded:
        loss: Any = sharded(ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        sharded.sum_gradients()
        assert all(error(a.cpu(), b) < 1e-4 for a, b in zip(gradients(model), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_up_on_gpus_as_on_hosts(comm: MPI.Intracomm, device: Any, dtype: torch.dtype) -> None:
    sums = []
    for where in (device, torch.device("cpu")):
        module = torch.nn.Linear(5, 301, dtype=dtype, device=where)
        for weight in module.parameters():
            whole = torch.randn(weight.shape, generator=torch.Generator().manual_seed(comm.Get_rank()))
            weight.grad = whole.to(where, dtype)
        mpiattn.torch.sum_gradients(module, comm)
        sums.append(gradients(module))
        assert all(gradient.device == where for gradient in sums[-1])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(*sums, strict=True))
