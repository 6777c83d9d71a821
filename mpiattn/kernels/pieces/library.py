"""Questions about a library before it is loaded: whether its packages are there, and whether it takes a problem."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec

from mpiattn.problems.problem import Problem


def found(name: str) -> ModuleSpec | None:
    """Return where a module is, None where it is not installed; it is not imported, but its parents are."""
    try:
        return find_spec(name)
    except ModuleNotFoundError:  # of a parent
        return None


def unfit_dtype(library: str, problem: Problem) -> str:
    """Return why a library of half precision does not take a problem's dtype, the empty string if it does."""
    name = problem.dtype.name
    return "" if name in ("float16", "bfloat16") else f"{library} attends in float16 and bfloat16, not {name}"


def unfit_heads(library: str, problem: Problem, step: int, largest: int, where: str = "") -> str:
    """Return why a library that takes head dims that are multiples of `step` does not take a problem's."""
    for name, dim in (("head_dim", problem.head_dim), ("v_head_dim", problem.v_head_dim)):
        if dim % step or dim > largest:
            return f"{library} needs a {name} of {step}, {2 * step}, ..., {largest}{where}, not {dim}"
    return ""
