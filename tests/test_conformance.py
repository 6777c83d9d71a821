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
