"""What other public calls are given, such as `choose` and `watch`; what is left when a communicator is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_connection import raises

import mpiattn
from mpiattn.planner import Task

SIZES: dict[str, Any] = {"tokens": 60, "heads": 4, "kv_heads": 2, "head_dim": 8}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"machine": 5}, "a machine is a Machine, a name, or the path of a TOML file, got 5"),
        ({"machine": ["laptop"]}, "a machine is a Machine"),
        ({"memory": "80GB"}, "memory must be more than 0 bytes, got '80GB'"),
        ({"memory": True}, "memory must be more than 0 bytes, got True"),
        ({"algorithms": "ring"}, "algorithms are names in a list"),
        ({"algorithms": []}, "algorithms are names in a list"),
        ({"algorithms": 5}, "algorithms are names in a list"),
        ({"algorithms": [5]}, "algorithms are names in a list"),
        ({"layout": 5}, "unknown layout 5"),
        ({"dtype": 5}, "unknown dtype 5"),
    ],
)
def test_choose(comm: Any, given: dict[str, Any], message: str) -> None:
    """Rank 0 plans: the others do not wait for it."""
    raises(comm, lambda: mpiattn.choose(comm, **SIZES, **given), message)


def test_tasks() -> None:
    dtype: Any = np.dtype(np.float32)
    assert Task(64, 4, 2, 8, dtype=dtype) == Task(64, 4, 2, 8, dtype="float32")
    with pytest.raises(mpiattn.InputError, match="can't share"):
        Task(64, 2**31 - 1, 2, 8)


@pytest.mark.mpi
@pytest.mark.parametrize("seconds", [0, -1, np.nan, np.inf, "5", None, True, [5], 10**400])
def test_seconds_of_a_watch(comm: Any, seconds: Any) -> None:
    raises(comm, lambda: mpiattn.watch(comm, seconds=seconds), "the watch takes a number above 0")


@pytest.mark.mpi
@pytest.mark.parametrize(
    "call",
    [
        lambda comm: mpiattn.watch(comm, seconds=5),
        lambda comm: mpiattn.choose(comm, **SIZES),
        lambda comm: mpiattn.auto(comm, **SIZES).__enter__(),
        mpiattn.use_gpu,
        lambda comm: mpiattn.scatter(None, comm, "zigzag"),
    ],
    ids=["watch", "choose", "auto", "use_gpu", "scatter"],
)
def test_what_is_no_communicator(comm: Any, call: Callable[[Any], Any]) -> None:
    raises(comm, lambda: call(None), "comm is None")
    raises(comm, lambda: call(3), "no MPI communicator but int")
    freed = comm.Dup()
    freed.Free()
    raises(comm, lambda: call(freed), "has been freed")


@pytest.mark.mpi
def test_what_an_attention_says_when_its_communicator_is_gone(comm: Any) -> None:
    own = comm.Dup()
    ring, heads = mpiattn.RingAttention(own), mpiattn.TensorParallelAttention(own)
    own.Free()
    for call in (
        lambda: ring.positions(12),
        lambda: ring.forward(*[np.zeros((1, 2, 3, 4))] * 3),
        lambda: heads.positions(12),
        lambda: heads.all_reduce(np.ones(3)),
        lambda: heads.project(np.ones((1, 2, 3, 4)), np.ones((8, 8))),
    ):
        raises(comm, call, "the communicator of this attention has been freed")
    ring.free()
    with mpiattn.RingAttention(comm) as ended:
        pass
    assert len(ended.positions(12 * comm.size)) == 12  # its communicator is there
