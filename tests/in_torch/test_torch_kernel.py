"""The kernel "torch": results of NumPy's kernel, for every mask, layout and dtype; and when it is chosen."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from one_process import causal, error, inputs, share, textbook, whole

import mpiattn
import mpiattn.torch
from mpiattn.kernels.numpy.kernel import NumpyKernel
from mpiattn.kernels.torch import choice
from mpiattn.kernels.torch.kernel import TorchKernel
from mpiattn.kernels.torch.parts import parts
from mpiattn.problems import layout as layouts
from mpiattn.problems.block import Block
from mpiattn.problems.mask import Causal, Documents, Full, Mask, SlidingWindow, allowed

Array = NDArray[Any]
TOKENS = 700
MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": SlidingWindow(70),
    "window both ways": SlidingWindow(30, 200),
    "documents": Documents([300, 0, 1, 45, 354]),
    "causal documents": Documents([300, 0, 1, 45, 354]) & Causal(),
}
TOLERANCE: dict[Any, float] = {np.float64: 1e-10, np.float32: 2e-5, np.float16: 4e-3, ml_dtypes.bfloat16: 3e-2}


def chunks(layout: str, ranks: int) -> list[Array]:
    return [layouts.positions(layout, TOKENS, ranks, rank) for rank in range(ranks)]


def results(kernel: Any, mask: Mask, layout: str, ranks: int, dtype: Any) -> list[Array]:
    random = np.random.default_rng(0)
    q, d_out = random.standard_normal((2, 1, 4, TOKENS, 16)).astype(dtype)
    k, v = random.standard_normal((2, 1, 2, TOKENS, 16)).astype(dtype)
    wide: Any = np.float64 if dtype == np.float64 else np.float32
    out, lse = np.zeros(q.shape, wide), np.full(q.shape[:3], -np.inf)
    sums = [np.zeros(x.shape, wide) for x in (q, k, v)]
    pairs = [(i, j) for i in chunks(layout, ranks) for j in chunks(layout, ranks)]
    for i, j in pairs:
        part, part_lse = out[:, :, i], lse[:, :, i]
        kernel.forward(q[:, :, i], k[:, :, j], v[:, :, j], block=Block(mask, i, j), out=part, lse=part_lse)
        out[:, :, i], lse[:, :, i] = part, part_lse
    delta = np.einsum("...td,...td->...t", d_out, out, dtype=wide)
    for i, j in pairs:
        d_q, d_k, d_v = sums[0][:, :, i], sums[1][:, :, j], sums[2][:, :, j]
        rows = {"d_out": d_out[:, :, i], "lse": lse[:, :, i], "delta": delta[:, :, i]}
        given = q[:, :, i], k[:, :, j], v[:, :, j]
        kernel.backward(*given, block=Block(mask, i, j), **rows, d_q=d_q, d_k=d_k, d_v=d_v)
        sums[0][:, :, i], sums[1][:, :, j], sums[2][:, :, j] = d_q, d_k, d_v
    return [out, lse, *sums]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("layout", "ranks"), [("contiguous", 1), ("zigzag", 3), ("striped", 2)])
def test_results_are_those_of_numpys_kernel(mask: str, layout: str, ranks: int) -> None:
    expected, own = (
        results(kernel, MASKS[mask], layout, ranks, np.float32) for kernel in (NumpyKernel(), TorchKernel())
    )
    compare(own, expected, 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype: Any) -> None:
    expected = results(NumpyKernel(), Causal(), "zigzag", 2, dtype)
    compare(results(TorchKernel(), Causal(), "zigzag", 2, dtype), expected, TOLERANCE[dtype])


def compare(own: list[Array], expected: list[Array], tolerance: float) -> None:
    for one, other in zip(own, expected, strict=True):
        finite = np.isfinite(other)
        assert (one[~finite] == other[~finite]).all()
        assert np.abs(one[finite] - other[finite]).max() <= tolerance * np.abs(other[finite]).max()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_parts_are_all_pairs_once(mask: str, layout: str) -> None:
    for i in chunks(layout, 3):
        for j in chunks(layout, 3):
            count = np.zeros((len(i), len(j)), int)
            for rows, keys, triangle, visible in parts(Block(MASKS[mask], i, j)):
                shape = rows.stop - rows.start, keys.stop - keys.start
                assert not triangle or shape[0] == shape[1]
                count[rows, keys] += np.tri(*shape, dtype=int) if triangle else (1 if visible is None else visible)
            assert (count == allowed(MASKS[mask], i, j)).all()


def test_a_row_that_sees_nothing_has_no_lse() -> None:
    # Torch says 0 of it, which would be a probability.
    q = np.ones((1, 1, 3, 8), np.float32)
    out, lse = np.zeros_like(q), np.full((1, 1, 3), -np.inf)
    TorchKernel().forward(
        q, q, q, block=Block(SlidingWindow(1), np.array([0, 5, 9]), np.array([1, 5, 6])), out=out, lse=lse
    )
    assert np.isneginf(lse[0, 0]).tolist() == [True, False, True] and not out[0, 0, [0, 2]].any()


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["ring", "mesh", "ulysses"])
def test_algorithms_take_it(comm: MPI.Intracomm, name: str) -> None:
    *qkv, d_out = inputs(tokens=61)
    qkv[2], d_out = (torch.nn.functional.pad(tensor, (0, 2)) for tensor in (qkv[2], d_out))
    expected: Any = [tensor.clone().requires_grad_() for tensor in qkv]
    textbook(expected, causal(61)).backward(d_out)
    with mpiattn.ALGORITHMS[name](comm, mask=Causal(), kernel="torch") as attention:
        own = [tensor.clone().requires_grad_() for tensor in share(attention, *qkv)]
        q, k, v = own
        mpiattn.torch.attention(attention, q, k, v).backward(share(attention, d_out)[0])
        assert attention.kernel.name == "torch"
        for tensor, other in zip(own, expected, strict=True):
            assert error(whole(attention, tensor.grad, 61), other.grad) < 1e-12


@pytest.mark.mpi
def test_what_it_cannot_do_is_refused(comm: MPI.Intracomm) -> None:
    def refused(words: str, dropout: Any = None, v_head_dim: int = 8, **options: Any) -> None:
        with mpiattn.RingAttention(comm, kernel="torch", **options) as attention:
            tokens = len(attention.positions(9))
            q, v = np.ones((1, 1, tokens, 8)), np.ones((1, 1, tokens, v_head_dim))
            with pytest.raises(mpiattn.InputError, match=words):
                attention.forward(q, q, v, dropout=dropout)

    refused("has no dropout: numpy can", dropout=mpiattn.Dropout(0.5))
    refused("has no softcap: numpy can", softcap=3.0)
    refused("one head_dim, not 8 and 6; kernel 'numpy' can", v_head_dim=6)


def test_it_is_chosen_where_it_is_much_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    brain = np.dtype(ml_dtypes.bfloat16)
    for factor, chosen in ((1.2, False), (2.5, True)):
        choice.faster.cache_clear()
        monkeypatch.setattr(choice, "seconds", lambda kernel, _, f=factor: f if kernel.name == "numpy" else 1.0)
        assert choice.faster(brain) is chosen
        assert not choice.faster(np.dtype(np.float32))
    choice.faster.cache_clear()
    monkeypatch.delitem(sys.modules, "torch")
    assert not choice.faster(brain)
    choice.faster.cache_clear()


def test_it_is_measured_in_milliseconds() -> None:
    assert 0 < choice.seconds(TorchKernel(), np.dtype(ml_dtypes.bfloat16)) < 1
