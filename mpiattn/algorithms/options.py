"""Options that an algorithm is built with, and one collective in which its ranks agree on them before any message."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from functools import partial
from inspect import signature
from typing import Any, TypedDict

import numpy as np

from ..errors import InputError
from ..messages.message import Communicator
from ..problems.mask import Mask
from ..problems.problem import PARTIALS
from ..problems.scalars import check_name, plain, real, shown, text


class Options(TypedDict, total=False):
    """Options of every algorithm's constructor; see `base.Attention`."""

    layout: str | None
    mask: Mask | None
    scale: float | None
    softcap: float | None
    partials: str
    kernel: str | None
    gpu_messages: str
    deterministic: bool


Check = partial[Any]
"""A function that raises ValueError or TypeError where its arguments don't fit; all ranks give it the same ones.

Its parameters have the names of the user's arguments: errors say them.
"""

Texts = tuple[str, str]
"""Two texts of an argument: one that is the same for equal numbers of any types, and one as the user gave it."""


def agree(comm: Communicator, *checks: Check) -> None:
    """Raise the same InputError on every rank where a check fails on one, or its arguments differ between ranks.

    The error is that of the first check that fails, on the first rank where it fails. This takes one collective.
    """
    everything = comm.allgather([(_given(check), _wrong(check)) for check in checks])
    # As many on all ranks, unless an earlier check says why not.
    for check, *answers in zip(checks, *everything, strict=False):
        for rank, (given, wrong) in enumerate(answers):
            if wrong is not None:
                raise InputError(wrong)
            if [same for same, _ in given] != [same for same, _ in answers[0][0]]:
                raise InputError(_difference(check, rank, given, answers[0][0]))


def _given(check: Check) -> list[Texts]:
    """Return the texts of each argument of a check."""
    return [(text(value), shown(plain(value))) for value in (*check.args, *check.keywords.values())]


def _difference(check: Check, rank: int, given: Sequence[Texts], first: Sequence[Texts]) -> str:
    """Return which argument of a check is another one on a rank than on rank 0."""
    parameters = signature(check.func).parameters.values()
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD][: len(check.args)]
    for name, mine, other in zip([*names, *check.keywords], given, first, strict=False):
        if mine[0] != other[0]:
            return f"{name} is {mine[1]} on rank {rank} and {other[1]} on rank 0: it must be the same on every rank"
    # The values of `alike` have no names.
    ours, theirs = (", ".join(said for _, said in texts) for texts in (given, first))
    return f"rank {rank} was given ({ours}), rank 0 ({theirs}): it must be the same on every rank"


def _wrong(check: Check) -> str | None:
    """Return what is wrong with the arguments of a check."""
    try:
        check()
    except (TypeError, ValueError) as error:
        return str(error)
    except Exception as error:  # of what the user gave, on this rank perhaps
        return f"{type(error).__name__}: {error}"
    return None


def alike(*values: object, **named: object) -> None:
    """Take any values, best by their names: they only have to be the same on all ranks."""


def check_names(algorithm: type, options: Collection[str], without: Collection[str] = ()) -> None:
    """Raise ValueError where the constructor of an algorithm does not take one of the options; it says which there are.

    Parameters
    ----------
    algorithm, options
    without : names that it takes, but not from this caller
    """
    parameters = signature(algorithm).parameters.values()
    takes = [*(one.name for one in parameters if one.kind is one.KEYWORD_ONLY), *Options.__annotations__]
    takes = [name for name in takes if name not in without]
    for name in options:
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(takes)}"
            raise ValueError(f"{algorithm.__name__} has no option {shown(name)}: {hint}")


def check_mask(mask: object) -> None:
    """Raise ValueError where that is no mask."""
    if not isinstance(mask, Mask):
        raise ValueError(
            "a mask is Full(), Causal(), SlidingWindow(...), Documents(...), or of a class of your own derived from "
            f"mpiattn.Mask, joined by &, got {shown(mask)}"
        )


def check_scale(scale: object) -> None:
    """Raise ValueError where that is no factor of scores."""
    if scale is not None and real(scale) is None:
        raise ValueError(f"a scale is a finite number, got {shown(scale)}")


def check_softcap(softcap: object) -> None:
    """Raise ValueError where that is no softcap."""
    if softcap is not None and (real(softcap) or 0) <= 0:
        raise ValueError(f"a softcap is a number above 0, got {shown(softcap)}")


def as_float(value: object) -> Any:
    """Return a number of any type as a float; anything else, which a check then refuses, as it is."""
    return value if real(value) is None else real(value)


def check_partials(partials: object) -> None:
    """Raise ValueError where that is no way for partial sums to travel."""
    check_name("partials", partials, PARTIALS)


def check_deterministic(deterministic: object) -> None:
    """Raise ValueError where that is neither yes nor no."""
    if not isinstance(deterministic, bool | np.bool_):
        raise ValueError(f"deterministic is True or False, got {shown(deterministic)}")
