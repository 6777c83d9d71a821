"""Every registered algorithm passes the conformance matrix, to the byte."""

from functools import partial
from typing import Any

import pytest

from mpiattn import ALGORITHMS
from mpiattn.conformance import Case, check, fast
from mpiattn.costs import COSTS


@pytest.mark.mpi
@pytest.mark.parametrize("case", fast(), ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_conformance(comm: Any, name: str, case: Case) -> None:
    for arguments in ALGORITHMS[name].variants(comm.Get_size()):
        check(partial(ALGORITHMS[name], **arguments), comm, case, partial(COSTS[name], **arguments))
