"""Options that an algorithm is built with, and one collective in which its ranks agree on them before any message."""

from __future__ import annotations

from functools import partial
from typing import Any, TypedDict

import numpy as np

from ..errors import InputError
from ..messages.message import Communicator
from ..problems.mask import Mask
from ..problems.problem import PARTIALS
from ..problems.scalars import check_name, real, shown, text


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
"""A function that raises ValueError or TypeError where its arguments don't fit; all ranks give it the same ones."""


def agree(comm: Communicator, *checks: Check) -> None:
    """Raise the same InputError on every rank where a check fails on one, or its arguments differ between ranks.

    The error is that of the first check that fails, on the first rank where it fails. This takes one collective.
    """
    everything = comm.allgather([(", ".join(map(text, check.args)), _wrong(check)) for check in checks])
    for answers in zip(*everything, strict=False):  # as many on all ranks, unless an earlier check says why not
        for rank, (given, wrong) in enumerate(answers):
            if wrong is not None:
                raise InputError(wrong)
            if given != answers[0][0]:
                raise InputError(f"rank {rank} was given ({given}), rank 0 ({answers[0][0]})")


def _wrong(check: Check) -> str | None:
    """Return what is wrong with the arguments of a check."""
    try:
        check()
    except (TypeError, ValueError) as error:
        return str(error)
    except Exception as error:  # of what the user gave, on this rank perhaps
        return f"{type(error).__name__}: {error}"
    return None


def alike(*values: object) -> None:
    """Take any values: they only have to be the same on all ranks."""


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
