"""Wrong grids, groups of heads and shares: the same error on every rank, and work goes on after it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import mpiattn
from mpiattn import ALGORITHMS
from mpiattn.arrays import Array
from mpiattn.errors import InputError

NAMES = ("allgather", "ulysses", "hybrid", "tensor_parallel")


def same_error(comm: Any, call: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("groups", [0, -1, 1.5, None])
def test_bad_head_groups(comm: Any, groups: Any) -> None:
    same_error(comm, lambda: mpiattn.AllGatherAttention(comm, head_groups=groups), "head_groups is 1 or more")


@pytest.mark.mpi(max_size=6)
def test_bad_grid(comm: Any) -> None:
    n = comm.Get_size()
    for ulysses, rows, cols in ((n + 1, None, None), (0, None, None), (1, n, 2), (None, n + 1, None), (-n, -1, 1)):
        build = partial(mpiattn.HybridAttention, comm, ulysses=ulysses, rows=rows, cols=cols)
        same_error(comm, build, f"is not {n} ranks: choose from .*1x{n}x1|are whole numbers, 1 or more, got")


@pytest.mark.mpi(min_size=2, max_size=6)
def test_different_arguments(comm: Any) -> None:
    rank, n = comm.Get_rank(), comm.Get_size()
    same_error(comm, lambda: mpiattn.AllGatherAttention(comm, head_groups=1 + (rank > 0)), "head_groups is 2 on rank 1")
    same_error(comm, lambda: mpiattn.HybridAttention(comm, ulysses=1 if rank else n), "ulysses is 1 on rank 1")


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("name", NAMES)
def test_bad_arrays(comm: Any, name: str) -> None:
    """After each error the algorithm still works."""
    with ALGORITHMS[name](comm, layout="contiguous") as attention:
        shapes = {"q": (1, 6, 24, 4), "k": (1, 6, 24, 4)}
        index = attention.owned("q", shapes)(shapes["q"], comm.Get_rank())
        own: Array = np.random.default_rng(0).standard_normal(shapes["q"])[index]
        last = comm.Get_rank() == comm.Get_size() - 1
        dims = own[..., :3] if last else own
        same_error(comm, lambda: attention.forward(own, dims, own), "head_dim|only the number of")
        wide = own.astype(np.float32) if last else own
        same_error(comm, lambda: attention.forward(own, own, wide), "one dtype|only the number of")
        same_error(comm, lambda: attention.forward(own, own, None if last else own), "must be an array of 4 axes")
        out, saved = attention.forward(own, own, own)
        same_error(comm, lambda: attention.backward(out[:, :, :-1] if last else out, saved), "d_out on rank")
        _, other = attention.forward(own[:, :, :, :2], own[:, :, :, :2], own)
        if comm.Get_size() > 1:
            chosen = other if last else saved
            same_error(comm, lambda: attention.backward(out, chosen), "another forward than on rank 0")
        attention.backward(out, saved)


@pytest.mark.mpi(min_size=2, max_size=6)
def test_bad_tokens(comm: Any) -> None:
    """Where tokens are spread their numbers must fit the layout; where heads are, all ranks have all tokens."""
    last = comm.Get_rank() == comm.Get_size() - 1
    for name, text in (("allgather", "layout of"), ("ulysses", "layout of"), ("tensor_parallel", "number of heads")):
        with ALGORITHMS[name](comm, layout="contiguous") as attention:
            own = np.zeros((1, 2, 9 if last else 4, 4))
            same_error(comm, lambda a=attention, x=own: a.forward(x, x, x), text)


@pytest.mark.mpi(max_size=6)
def test_bad_projection(comm: Any) -> None:
    last = comm.Get_rank() == comm.Get_size() - 1
    out = np.zeros((1, 2, 3, 4))
    with mpiattn.TensorParallelAttention(comm) as attention:
        same_error(comm, lambda: attention.project(out, np.zeros((9 if last else 8, 5))), "heads \\* head_dim")
        same_error(comm, lambda: attention.project(out if not last else out[0], np.zeros((8, 5))), "heads \\* head_dim")
        if comm.Get_size() > 1:
            weight = np.zeros((8, 6 if last else 5))
            same_error(comm, lambda: attention.project(out, weight), "all-reduce takes")
