"""Cases chosen by their values: each case of the matrix with the values that are asked for in place of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .case import Case
from .user_masks import parse


def select(cases: Sequence[Case], values: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Return the cases with each combination of values, each once, but for those that make no problem.

    Parameters
    ----------
    cases : sequence of Case
    values : for some names of Case's, what they are to be
        V's head_dim is that of Q and K where this is given, and the keys are as many as the tokens.
    """
    chosen: dict[Case, None] = {}
    for case, combination in itertools.product(cases, itertools.product(*values.values())):
        wanted = dict(zip(values, combination, strict=True))
        if "head_dim" in wanted:
            wanted["v_head_dim"] = wanted["head_dim"]
        if "tokens" in wanted:
            wanted["kv_tokens"] = None
        changed = replace(case, **wanted)
        if poses_a_problem(changed):
            chosen[changed] = None
    return list(chosen)


def poses_a_problem(case: Case) -> bool:
    """Say whether the values of a case go together."""
    if case.heads % case.kv_heads or (case.peak and case.dtype != "float64"):  # so large logits need its digits
        return False
    try:
        parse(case.mask).check(case.tokens, case.shapes["k"][2])
    except ValueError:
        return False
    return True
