"""Numbers and names as arguments. Numbers of Python, NumPy, and arrays without axes are kept as Python's."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """Return a NumPy scalar, or an array without axes, as Python's number; anything else as it is."""
    if getattr(value, "shape", None) != () or not callable(getattr(value, "item", None)):
        return value
    number = value.item()
    # NumPy has no number of Python's for a longdouble.
    return float(number) if isinstance(number, Real) and not isinstance(number, Integral) else number


def whole(value: object, floats: bool = False) -> int | None:
    """Return a whole number of any type as an int, and None where it is none.

    Parameters
    ----------
    value : object
        True and False are no numbers here.
    floats : bool
        Whether 5.0 is a whole number, too.
    """
    value = plain(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return int(value) if floats and isinstance(value, float) and value.is_integer() else None


def real(value: object) -> float | None:
    """Return a finite number of any type as a float, and None where it is none, or too large for a float."""
    value = plain(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def text(value: object) -> str:
    """Return a value as text, the same for numbers that are equal, whatever their types."""
    value = plain(value)
    return shown(int(value) if isinstance(value, float) and value.is_integer() else value)


def shown(value: object) -> str:
    """Return a value as Python shows it; where it can't, as with numbers of 5,000 digits, the name of its type."""
    try:
        return repr(value)
    except Exception:  # whatever a class of the user's raises
        return f"a value of type {type(value).__name__} that has no text"


def check_name(what: str, name: object, known: Collection[str]) -> None:
    """Raise ValueError where that is none of the known names."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown {what} {shown(name)}: choose from {', '.join(known)}")
