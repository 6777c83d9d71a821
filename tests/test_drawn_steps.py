"""The steps that the text of `mesh.py` draws are those that rank 0 makes."""

from __future__ import annotations

import re
from typing import Any

from mpiattn import MeshAttention, machines, virtual
from mpiattn.algorithms import mesh
from mpiattn.trace.comm import TracedComm

TAGS = {"Q": "Q", "KV": "KV", "O": "O", "dQ": "D_Q", "dKV": "D_KV"}


def rank_of(column: str) -> int:
    return int(re.findall(r"rank (\d)", column)[0])


def made(comm: Any) -> Any:
    """Return the messages and blocks of a rank, forward and backward, by kind."""
    traced = TracedComm(comm)
    with MeshAttention(traced, rows=2, cols=3) as attention:
        q, k, v = (virtual.empty((1, 8, 64, 64), "float32") for _ in "qkv")
        out, saved = attention.forward(q, k, v)
        attention.backward(out, saved)
        steps = attention.forward_steps + attention.backward_steps
        computed = [(attention.q_owners[j], attention.kv_owners[i]) for _, tasks in steps for i, j, _ in tasks]
    events = traced.trace.events
    messages = {kind: [(e.name, e.peer) for e in events if e.kind == kind] for kind in ("receive", "send")}
    return messages | {"compute": computed}


def test_the_tables_of_the_mesh() -> None:
    assert mesh.__doc__ is not None
    rows = [re.split(r" {2,}", line.strip()) for line in mesh.__doc__.splitlines() if re.search(r"\d +\w+ hop", line)]
    drawn: dict[str, list[Any]] = {"receive": [], "send": [], "compute": []}
    for _, message, arrives, leaves, *computes in rows:
        tag = TAGS[message.split()[0]]
        drawn["receive"].append((tag, rank_of(arrives)))
        drawn["send"].append((tag, rank_of(leaves)))
        drawn["compute"] += [tuple(map(int, pair.split(", "))) for pair in computes]
    assert len(rows) == 11
    assert virtual.run(6, machines.load("laptop"), made)[0] == drawn
