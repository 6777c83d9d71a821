"""Every registered algorithm passes the conformance matrix, to the byte."""

from functools import partial
from typing import Any

import pytest

from mpiattn import ALGORITHMS
from mpiattn.conformance.case import Case, fast
from mpiattn.conformance.check import check
from mpiattn.costs import COSTS

CASES = fast()


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_conformance(comm: Any, name: str, case: Case) -> None:
    size = comm.Get_size()
    if size > 4 and (CASES.index(case) + size) % 3:
        pytest.skip("runs on one of three numbers of ranks, as ranks that share cores are slow")
    for arguments in ALGORITHMS[name].variants(size):
        check(partial(ALGORITHMS[name], **arguments), comm, case, partial(COSTS[name], **arguments))


OF_HEADS = [
    *(
        Case(heads=heads, kv_heads=kv_heads, tokens=tokens, mask=mask, v_head_dim=5, batch=2)
        for heads, kv_heads in [(4, 4), (8, 2), (6, 1), (3, 3), (5, 1), (6, 3), (12, 4), (1, 1)]
        for tokens, mask in ((29, "causal"), (3, "window=4,2"))
    ),
    *(Case(mask="full", tokens=q, kv_tokens=kv) for q, kv in [(17, 40), (40, 3), (1, 9), (5, 0), (0, 5)]),
    # Ranks that share a K/V head send their partial sums wide.
    *(Case(heads=4, kv_heads=1, head_dim=16, v_head_dim=16, dtype=dtype) for dtype in ("float32", "bfloat16")),
]


@pytest.mark.mpi(max_size=6)
@pytest.mark.parametrize("case", OF_HEADS, ids=str)
@pytest.mark.parametrize("name", ["allgather", "ulysses", "hybrid", "tensor_parallel"])
def test_algorithms_that_share_out_heads(comm: Any, name: str, case: Case) -> None:
    for arguments in ALGORITHMS[name].variants(comm.Get_size()):
        check(partial(ALGORITHMS[name], **arguments), comm, case, partial(COSTS[name], **arguments))
