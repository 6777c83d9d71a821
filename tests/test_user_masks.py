"""Masks of a user's own: right where they keep to the contract, else the same error on every rank, and no hang."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mpiattn
from mpiattn import InputError
from mpiattn.conformance import oracle
from mpiattn.planner.task import Task
from mpiattn.problems.user_mask import held
from mpiattn.trace.comm import TracedComm

Array = NDArray[Any]
TOKENS = 31
EVERY = np.arange(TOKENS)
DOCS = Path(__file__).parents[1] / "docs"


class Prefix(mpiattn.Mask):
    """The tokens before `prefix` see each other; counts how often it is asked."""

    def __init__(self, prefix: int) -> None:
        self.prefix, self.asked = prefix, 0

    def bounds(self, queries: Array) -> tuple[Array, Array]:
        self.asked += 1
        return np.zeros_like(queries), np.maximum(queries + 1, self.prefix)


PREFIX = (EVERY[:, None] >= EVERY) | (EVERY < 9)


def inputs(tokens: int = TOKENS) -> list[Array]:
    """Return q, k, v, d_out, the same on every rank."""
    return list(np.random.default_rng(0).standard_normal((4, 1, 2, tokens, 4)))


def errors(attention: Any, visible: Array) -> float:
    """Return the largest error of out, dQ, dK, dV on this rank, given which keys the queries see."""
    arrays = inputs(len(visible))
    mine = attention.positions(len(visible))
    q, k, v, d_out = (np.ascontiguousarray(array[:, :, mine]) for array in arrays)
    out, saved = attention.forward(q, k, v)
    results = [out, *attention.backward(d_out, saved)]
    q, k, v, d_out = arrays
    right = [oracle.attention(q, k, v, visible)[0], *oracle.gradients(q, k, v, d_out, visible)]
    return max(float(np.abs(a - b[:, :, mine]).max(initial=0)) for a, b in zip(results, right, strict=True))


def refusal(comm: Any, act: Callable[[], object]) -> str:
    """Return the one message with which all ranks refuse."""
    with pytest.raises(InputError) as caught:
        act()
    texts = comm.allgather(str(caught.value))
    assert set(texts) == {texts[0]}
    return str(texts[0])


def blocks(name: str) -> list[str]:
    """Return the Python code of a page of the documentation."""
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


# Masks that keep to the contract


@pytest.mark.mpi
def test_the_documented_prefix_lm_mask(comm: Any) -> None:
    """The code in docs/masks.md runs, and its output is what its oracle says; its class takes ten lines."""
    example, check = blocks("masks.md")
    q, k, v, _ = inputs(140)
    names: dict[str, Any] = {"comm": comm, "tokens": 140, "q": q, "k": k, "v": v}
    exec(example, names)
    exec(check, names)
    assert np.abs(names["out"] - names["right"][:, :, names["mine"]]).max(initial=0) < 1e-12
    assert names["attention"].layout == "zigzag"
    lines = example[example.index("class") : example.index("with")].split("\n")
    assert len([line for line in lines if line.strip()]) <= 10


@pytest.mark.mpi
def test_the_documented_causal_mask_of_the_lower_right_corner(comm: Any) -> None:
    names: dict[str, Any] = {}
    exec(blocks("limits.md")[0], names)
    (q, *_), (_, k, v, _) = inputs(6), inputs(15)
    with mpiattn.RingAttention(comm, mask=names["CausalToTheEnd"](6, 15)) as attention:
        mine, keys = attention.positions(6), attention.positions(15)
        out, _ = attention.forward(q[:, :, mine], k[:, :, keys], v[:, :, keys])
    visible = np.arange(15) <= np.arange(6)[:, None] + 9
    assert np.abs(out - oracle.attention(q, k, v, visible)[0][:, :, mine]).max(initial=0) < 1e-12


@pytest.mark.mpi
def test_a_mask_is_asked_once_for_a_problem(comm: Any) -> None:
    """Also when it is used for several passes; another number of tokens is another problem."""
    mask = Prefix(9)
    with mpiattn.MeshAttention(comm, mask=mask) as attention:
        assert mask.asked == 0
        assert errors(attention, PREFIX) < 1e-12
        once = mask.asked
        assert errors(attention, PREFIX) < 1e-12 and mask.asked == once <= 2
        assert errors(attention, PREFIX[:20, :20]) < 1e-12 and mask.asked == 2 * once


@pytest.mark.mpi
def test_one_small_collective_more(comm: Any) -> None:
    traced = TracedComm(comm)
    with mpiattn.RingAttention(traced, mask=Prefix(9)) as attention:
        traced.trace.clear()
        for collectives in (["allgather", "allgather"], []):  # the mask, then the plan
            errors(attention, PREFIX)
            names = [event.name for event in traced.trace.events if event.name == "allgather"]
            assert names == collectives
            traced.trace.clear()


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["dense", "ring", "mesh", "allgather", "ulysses"])
@pytest.mark.parametrize("far", [sys.maxsize, 10**30, math.inf], ids=str)
def test_windows_beyond_int64(comm: Any, name: str, far: float) -> None:
    q, k, v, _ = inputs()
    weights = np.where(EVERY[:, None] - 3 <= EVERY, np.exp(q @ k.swapaxes(2, 3) / 2), 0)
    total = weights.sum(axis=3, keepdims=True)
    with mpiattn.ALGORITHMS[name](comm, mask=mpiattn.SlidingWindow(3, far)) as attention:
        mine = attention.positions(TOKENS)
        out, saved = attention.forward(q[:, :, mine], k[:, :, mine], v[:, :, mine])
        assert np.abs(out - (weights / total @ v)[:, :, mine]).max(initial=0) < 1e-12
        assert name == "ulysses" or np.abs(saved.lse - np.log(total)[:, :, mine, 0]).max(initial=0) < 1e-12
        assert errors(attention, EVERY[:, None] - 3 <= EVERY) < 1e-12


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("mask", [mpiattn.SlidingWindow(5), mpiattn.SlidingWindow(sys.maxsize), Prefix(3)], ids="abc")
def test_cache_positions_near_the_end_of_int64(comm: Any, mask: mpiattn.Mask) -> None:
    """They are those of the first 31 tokens, moved: the bounds of a window move with them."""
    (q, *_), (_, k, v, _), moved = inputs(2), inputs(), 2**63 - 1 - TOKENS
    mine = np.array_split(EVERY, comm.Get_size())[comm.Get_rank()]
    outs = []
    for first in (0, moved):
        with mpiattn.DecodeAttention(comm, mask=mask) as attention:
            outs.append(attention.forward(q, k[:, :, mine], v[:, :, mine], kv_positions=mine + first)[0])
    np.testing.assert_array_equal(*outs)
    with mpiattn.DecodeAttention(comm, mask=mask) as attention:
        own = k[:, :, mine], v[:, :, mine]
        text = refusal(comm, lambda: attention.forward(q, *own, kv_positions=mine + moved + 1))
        assert "must be int64, 0 to 2**63 - 2, ascending" in text


class Late(mpiattn.Mask):
    """Queries before 12 see nothing; bounds beyond int64, and the argument is worked on in place."""

    def bounds(self, queries: Array) -> tuple[Array, Array]:
        queries -= 12
        hi = np.where(queries < 0, 0, 2**64 - 1).astype(np.uint64)
        return np.maximum(queries, 0).astype(np.int32), hi


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["dense", "ring", "mesh", "allgather", "ulysses"])
def test_bounds_of_any_size_and_integer_dtype(comm: Any, name: str) -> None:
    visible = (EVERY[:, None] - 12 <= EVERY) & (EVERY[:, None] >= 12)
    with mpiattn.ALGORITHMS[name](comm, mask=Late()) as attention:
        assert errors(attention, visible) < 1e-12
    with mpiattn.ALGORITHMS[name](comm, mask=Late() & mpiattn.Causal()) as attention:
        assert errors(attention, visible & (EVERY[:, None] >= EVERY)) < 1e-12


@dataclass
class Ends(mpiattn.Mask):
    """Neither hashable nor comparable, and its text has no end."""

    ends: Array

    def bounds(self, queries: Array) -> tuple[Array, Array]:
        return np.zeros_like(queries), self.ends[queries]

    def check(self, query_tokens: int, key_tokens: int) -> None:
        if query_tokens != len(self.ends):
            raise ValueError(f"there are {len(self.ends)} ends for {query_tokens} queries")


@pytest.mark.mpi
def test_masks_need_no_hash_no_equality_and_no_text(comm: Any) -> None:
    ends = np.maximum.accumulate(EVERY + 3)
    with mpiattn.MeshAttention(comm, mask=Ends(ends)) as one, mpiattn.MeshAttention(comm, mask=Ends(ends)) as other:
        for attention in (one, other):
            assert errors(attention, ends[:, None] > EVERY) < 1e-12
        text = refusal(comm, lambda: errors(one, PREFIX[:20, :20]))
        assert text == "there are 31 ends for 20 queries"
    one_mask, same = Prefix(2), held(Prefix(2))
    assert held(one_mask) == held(one_mask) != same != 3
    assert hash(held(one_mask)) == hash(held(one_mask))


@pytest.mark.mpi(max_size=4)
def test_decoding_asks_for_the_last_queries(comm: Any) -> None:
    with mpiattn.DecodeAttention(comm, mask=Prefix(9)) as attention:
        for tokens, new in ((20, 1), (21, 1), (31, 4)):
            (q, *_), (_, k, v, _) = inputs(new), inputs(tokens)
            mine = attention.positions(tokens)
            out, _ = attention.forward(q, k[:, :, mine], v[:, :, mine])
            right, _ = oracle.attention(q, k, v, PREFIX[tokens - new : tokens, :tokens])
            assert np.abs(out - right).max() < 1e-12
    with mpiattn.DecodeAttention(comm, mask=Prefix(9) & mpiattn.Documents([20, 11])) as attention:
        out, _ = attention.forward(q, k[:, :, mine], v[:, :, mine])  # of the sequence of 31 tokens, not of 4
        right, _ = oracle.attention(q, k[:, :, 20:], v[:, :, 20:], PREFIX[27:, 20:])
        assert np.abs(out - right).max() < 1e-12


@pytest.mark.mpi(max_size=4)
def test_auto_plans_for_a_users_mask(comm: Any) -> None:
    sizes: dict[str, Any] = {"tokens": np.int64(TOKENS), "heads": 2, "head_dim": 4, "dtype": "float64"}
    with mpiattn.auto(comm, mask=Prefix(9), algorithms=["ring", "mesh"], machine="ethernet", **sizes) as attention:
        assert errors(attention, PREFIX) < 1e-12
    text = refusal(comm, lambda: mpiattn.choose(comm, mask=Wrong("global tokens"), machine="ethernet", **sizes))
    assert "hi of the mask Wrong decreases" in text


def test_tasks_take_a_users_mask() -> None:
    task = Task(TOKENS, 2, 2, 4, mask=Prefix(9))
    assert int(task.problem(3).pairs.sum()) == PREFIX.sum()
    with pytest.raises(InputError, match="hi of the mask Wrong decreases"):
        Task(TOKENS, 2, 2, 4, mask=Wrong("global tokens"))


# Masks that don't


class Wrong(mpiattn.Mask):
    """A mask with one fault."""

    def __init__(self, fault: str, rank: int = 0) -> None:
        self.fault, self.rank, self.random = fault, rank, np.random.default_rng(3)

    def bounds(self, queries: Array) -> Any:
        zeros, ends, few = np.zeros_like(queries), queries + 1, queries < 4
        bounds: dict[str, Callable[[], Any]] = {
            "global tokens": lambda: (np.where(few, 0, np.maximum(queries - 3, 0)), np.where(few, 31, ends)),
            "lo decreases": lambda: (30 - queries, zeros + 31),
            "before the sequence": lambda: (queries - 3, ends),
            "hi before the sequence": lambda: (zeros, zeros - 1),
            "floats": lambda: (zeros, queries + 0.5),
            "infinity": lambda: (zeros, np.full(len(queries), np.inf)),
            "booleans": lambda: (zeros > 0, ends),
            "objects": lambda: (zeros, np.full(len(queries), None)),
            "one number": lambda: (0, ends),
            "two axes": lambda: (zeros, ends[:, None]),
            "masked": lambda: (zeros, np.ma.masked_array(ends, few)),
            "too few": lambda: (zeros[1:], ends),
            "one array": lambda: ends,
            "nothing": lambda: None,
            "depends on how many": lambda: (zeros, zeros + len(queries)),
            "depends on neighbours": lambda: (zeros, np.arange(1, len(queries) + 1)),
            "random": lambda: (zeros, ends + self.random.integers(4)),
            "raises": lambda: queries[31],
            "raises on one rank": lambda: queries[31] if self.rank == 1 else (zeros, ends),
            "differs": lambda: (zeros, ends + self.rank),
        }
        return bounds[self.fault]()


FAULTS = {
    "global tokens": "hi of the mask Wrong decreases: it is 31 for query 3 and 5 for query 4. A mask is one interval",
    "lo decreases": "lo of the mask Wrong decreases: it is 30 for query 0 and 29 for query 1",
    "before the sequence": r"lo of the mask Wrong is -3 for query 0, .* np.maximum\(..., 0\)",
    "hi before the sequence": "hi of the mask Wrong is -1 for query 0",
    "floats": "hi of the mask Wrong is of float64: bounds are integers",
    "infinity": r"of float64: .* np.iinfo\(np.int64\).max is no limit",
    "booleans": "lo of the mask Wrong is of bool: bounds are integers",
    "objects": "hi of the mask Wrong is of object: bounds are integers",
    "one number": r"lo of the mask Wrong is int: it must be a NumPy array of shape \(31,\)",
    "two axes": r"hi of the mask Wrong is of shape \(31, 1\): it must be a NumPy array of shape \(31,\)",
    "masked": "hi of the mask Wrong is numpy.ma.MaskedArray",
    "too few": r"lo of the mask Wrong is of shape \(30,\)",
    "one array": "bounds of the mask Wrong returns ndarray, not the two arrays lo and hi",
    "nothing": "bounds of the mask Wrong returns NoneType",
    "depends on how many": "for query 10 it is 31 among all queries and 11 among some",
    "depends on neighbours": "hi of the mask Wrong changes from call to call: for query 10 it is 11 among all queries",
    "random": "hi of the mask Wrong changes from call to call",
    "raises": "bounds of the mask Wrong raised IndexError: index 31 is out of bounds",
}


@pytest.mark.mpi
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(comm: Any, fault: str) -> None:
    with mpiattn.RingAttention(comm, mask=Wrong(fault)) as attention:
        text = refusal(comm, lambda: errors(attention, PREFIX))
        assert re.search(FAULTS[fault], text), text
        assert fault == "random" or refusal(comm, lambda: errors(attention, PREFIX)) == text


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", mpiattn.ALGORITHMS)
def test_every_algorithm_refuses(comm: Any, name: str) -> None:
    """Those, too, that would give the right value, so that each can be taken for another."""
    for mask in (Wrong("global tokens"), mpiattn.SlidingWindow(40, 40) & Wrong("global tokens")):
        with mpiattn.ALGORITHMS[name](comm, mask=mask) as attention:
            q, k, v, _ = inputs()
            shapes = {"q": q.shape, "k": k.shape}
            own = [
                np.ascontiguousarray(array[attention.owned(name, shapes)(array.shape, comm.Get_rank())])
                for name, array in zip("qkv", (q, k, v), strict=True)
            ]
            if name == "decode":
                own[0] = q
            assert "decreases" in refusal(comm, lambda: attention.forward(*own))  # noqa: B023


@pytest.mark.mpi(min_size=2)
def test_faults_of_one_rank(comm: Any) -> None:
    for fault, message in (
        ("raises on one rank", "bounds of the mask Wrong raised IndexError"),
        ("differs", "the mask Wrong on rank 1 has other bounds than on rank 0"),
    ):
        with mpiattn.RingAttention(comm, mask=Wrong(fault, comm.Get_rank())) as attention:
            assert message in refusal(comm, lambda: errors(attention, PREFIX))
    mask = Prefix(9) if comm.Get_rank() else mpiattn.Causal()
    assert "mask is Prefix on rank 1 and Causal() on rank 0" in refusal(
        comm, lambda: mpiattn.RingAttention(comm, mask=mask)
    )


class Unfit(mpiattn.Mask):
    """Whose other methods raise, on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @property
    def causal(self) -> bool:
        if self.rank == 0:
            raise RuntimeError("no idea")
        return False

    def bounds(self, queries: Array) -> tuple[Array, Array]:
        return np.zeros_like(queries), queries + 1

    def check(self, query_tokens: int, key_tokens: int) -> None:
        if self.rank == 0:
            raise TypeError("it does not fit")


@pytest.mark.mpi(max_size=4)
def test_other_methods_that_raise(comm: Any) -> None:
    with mpiattn.RingAttention(comm, mask=Unfit(comm.Get_rank())) as attention:
        text = refusal(comm, lambda: errors(attention, PREFIX))
        assert text == "check of the mask Unfit raised TypeError: it does not fit"


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("mask", [mpiattn.Causal, "causal", lambda queries: queries, EVERY])
def test_what_is_no_mask(comm: Any, mask: Any) -> None:
    assert "derived from mpiattn.Mask" in refusal(comm, lambda: mpiattn.RingAttention(comm, mask=mask))
    with pytest.raises(TypeError, match="unsupported operand"):
        mpiattn.Causal() & mask
