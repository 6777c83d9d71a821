"""Tensor parallelism: the output projection and its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mpiattn
from mpiattn.conformance.case import Case
from mpiattn.conformance.oracle import TOLERANCES, error
from mpiattn.costs.traffic import allreduce
from mpiattn.problems import layout
from mpiattn.trace.comm import TracedComm


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("heads", [6, 2])
def test_projection(comm: Any, heads: int, dtype: str) -> None:
    """The rows of the weight lie on the ranks as the heads do; what every rank gets is the whole product."""
    rng = np.random.default_rng(0)
    tokens, dim, features, size, rank = 7, 5, 11, comm.Get_size(), comm.Get_rank()
    case = Case(dtype=dtype)
    out, weight, d_y = (
        rng.standard_normal(shape).astype(mpiattn.arrays.dtype(case.dtype))
        for shape in ((2, heads, tokens, dim), (heads, dim, features), (2, tokens, features))
    )
    traced = TracedComm(comm)
    with mpiattn.TensorParallelAttention(traced) as attention:
        own = layout.heads(heads, heads, size, rank)[0]
        rows = weight[own].reshape(-1, features)
        y = attention.project(out[:, own], rows)
        spec = (2, tokens, features), np.dtype("float64" if dtype == "float64" else "float32")
        expected = allreduce(spec, size, rank)
        assert traced.trace.received() == (expected.messages, expected.nbytes)
        traced.trace.clear()
        d_out, d_rows = attention.project_backward(d_y, out[:, own], rows)
        assert traced.trace.received() == (0, 0)
    wide_out, wide_weight, wide_d_y = (array.astype(np.float64) for array in (out, weight, d_y))
    tolerance = TOLERANCES[dtype]
    assert y.dtype == out.dtype
    assert error(y, np.einsum("bhtd,hdf->btf", wide_out, wide_weight)) < tolerance
    assert error(d_out, np.einsum("btf,hdf->bhtd", wide_d_y, wide_weight)[:, own]) < tolerance
    expected_rows = np.einsum("bhtd,btf->hdf", wide_out, wide_d_y)[own].reshape(-1, features)
    assert error(d_rows, expected_rows) < tolerance


@pytest.mark.mpi(min_size=2, max_size=6)
def test_all_reduce(comm: Any) -> None:
    with mpiattn.TensorParallelAttention(comm) as attention:
        total = attention.all_reduce(np.full((3, 2), comm.Get_rank(), np.float32).T)
        assert np.array_equal(total, np.full((2, 3), sum(range(comm.Get_size()))))
