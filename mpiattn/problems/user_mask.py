"""Masks of a user's own: compared and named whatever their class, and asked once for a problem.

What a user's `bounds` returns is checked against the contract of `mask.Mask` and kept as numbers, so that no later
call can return others. What a mask is to do with several intervals for each query would be kept here, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .mask import END, Causal, Documents, Full, Intersection, Mask, Positions, SlidingWindow


class UserMask(Mask):
    """A mask of a user's own, until there is a problem.

    Two are equal where one object is both, or where the class of both says so. The name is that of the class, the
    same on every rank, as a text with an address is not.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UserMask) or type(other.mask) is not type(self.mask):
            return False
        try:
            return self.mask is other.mask or bool(self.mask == other.mask)
        except Exception:  # as of a dataclass with arrays
            return False

    def __hash__(self) -> int:
        return hash(type(self.mask))

    def __repr__(self) -> str:
        return named(self.mask)

    @property
    def causal(self) -> bool:
        """The property of the user's class."""
        return _says(self.mask, "causal")

    @property
    def windowed(self) -> bool:
        """The property of the user's class."""
        return _says(self.mask, "windowed")

    def tabulated(self, queries: Positions, query_tokens: int, key_tokens: int) -> TabulatedMask:
        """Return the mask as numbers, for consecutive positions of queries, or raise InputError where it is none."""
        name = named(self.mask)
        try:
            self.mask.check(query_tokens, key_tokens)
        except ValueError as error:
            raise InputError(str(error)) from error
        except Exception as error:
            raise InputError(f"check of the mask {name} raised {type(error).__name__}: {error}") from error
        lo, hi = _checked(name, self.mask, queries)
        for what, bound in (("lo", lo), ("hi", hi)):
            if len(less := np.flatnonzero(np.diff(bound) < 0)):
                one = int(less[0])
                raise InputError(
                    f"{what} of the mask {name} decreases: it is {bound[one]} for query {queries[one]} and "
                    f"{bound[one + 1]} for query {queries[one + 1]}. A mask is one interval of keys for each query, "
                    "and neither bound may decrease; what needs several intervals, such as global tokens beside a "
                    "window, cannot be a mask"
                )
        some = slice(len(queries) // 3, None, 2)  # they have another place in the array, and other neighbours
        again = _checked(name, self.mask, queries[some])
        for what, bound, other in (("lo", lo[some], again[0]), ("hi", hi[some], again[1])):
            if len(changed := np.flatnonzero(bound != other)):
                at = int(changed[0])
                raise InputError(
                    f"{what} of the mask {name} changes from call to call: for query {queries[some][at]} it is "
                    f"{bound[at]} among all queries and {other[at]} among some. The bounds of a query depend on its "
                    "position alone"
                )
        of = name, query_tokens, key_tokens, _first(queries)
        return TabulatedMask(*of, lo.tobytes(), hi.tobytes(), (self.causal, self.windowed))


@dataclass(frozen=True)
class TabulatedMask(Mask):
    """The bounds of a mask at all queries of a problem, which are consecutive.

    Attributes
    ----------
    name : str
    query_tokens, key_tokens : int
        Of the whole sequences.
    first : int
        Position of the first query.
    lo, hi : bytes
        int64, 0 to `END`.
    says : bool, bool
        Whether the mask calls itself causal and windowed.
    """

    name: str
    query_tokens: int
    key_tokens: int
    first: int
    lo: bytes
    hi: bytes
    says: tuple[bool, bool] = (False, False)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"{self.name} of {self.query_tokens} queries and {self.key_tokens} keys"

    @property
    def causal(self) -> bool:
        """The property of the user's mask."""
        return self.says[0]

    @property
    def windowed(self) -> bool:
        """The property of the user's mask."""
        return self.says[1]

    def holds(self, queries: Positions, query_tokens: int, key_tokens: int) -> bool:
        """Return whether these are the queries, of sequences of so many tokens."""
        same = query_tokens, key_tokens, _first(queries), queries.nbytes
        return same == (self.query_tokens, self.key_tokens, self.first, len(self.lo))

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        """Return lo and hi of some of the queries."""
        places = queries - self.first
        lo, hi = (np.frombuffer(bound, np.int64)[places] for bound in (self.lo, self.hi))
        return lo, hi

    def check(self, query_tokens: int, key_tokens: int) -> None:
        """Raise InputError where sequences have other numbers of tokens."""
        if (query_tokens, key_tokens) != (self.query_tokens, self.key_tokens):
            raise InputError(
                f"the mask {self.name} was asked for {self.query_tokens} queries and {self.key_tokens} keys, "
                f"not for {query_tokens} and {key_tokens}"
            )


def held(mask: object) -> Any:
    """Return a mask as the package keeps it: a user's as a `UserMask`, all else as it is; None is no limit."""
    if mask is None:
        return Full()
    return UserMask(mask) if isinstance(mask, Mask) and not _ours(mask) else mask


def named(mask: Mask) -> str:
    """Return the text of a mask of ours, and the name of a user's class, joined by + where they are."""
    if type(mask) is Intersection:
        return f"{named(mask.first)}+{named(mask.second)}"
    return str(mask) if _ours(mask) else type(mask).__qualname__


def _ours(mask: Mask) -> bool:
    """Return whether a mask, and all that it is joined of, is of this package; subclasses are not."""
    if type(mask) is Intersection:
        return _ours(mask.first) and _ours(mask.second)
    return type(mask) in (Full, Causal, SlidingWindow, Documents, UserMask, TabulatedMask)


def _first(queries: Positions) -> int:
    """Return the position of the first query; 0 where there is none."""
    return int(queries[0]) if len(queries) else 0


def _says(mask: Mask, name: str) -> bool:
    """Return what a mask says of itself; False where that raises, on one rank perhaps."""
    try:
        return bool(getattr(mask, name))
    except Exception:
        return False


def _checked(name: str, mask: Mask, queries: Positions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return lo and hi of a mask as int64 up to `END`, or raise InputError where they are no bounds."""
    if type(mask) is Intersection:  # of each part by itself: NumPy makes floats of uint64 and int64
        parts = [_checked(named(part), part, queries) for part in (mask.first, mask.second)]
        (lo, hi), (other_lo, other_hi) = parts
        return np.maximum(lo, other_lo), np.minimum(hi, other_hi)
    try:
        bounds = mask.bounds(queries.copy())
    except Exception as error:
        raise InputError(f"bounds of the mask {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise InputError(f"bounds of the mask {name} returns {type(bounds).__name__}, not the two arrays lo and hi")
    lo, hi = bounds
    return _bound(f"lo of the mask {name}", lo, queries), _bound(f"hi of the mask {name}", hi, queries)


def _bound(what: str, given: object, queries: Positions) -> NDArray[np.int64]:
    """Return one of the bounds as int64 up to `END`."""
    masked = isinstance(given, np.ma.MaskedArray)  # what it hides would be numbers
    bound = given if isinstance(given, np.ndarray) and not masked else None
    if bound is None or bound.shape != queries.shape:
        shown = f"{type(given).__module__}.{type(given).__qualname__}" if bound is None else f"of shape {bound.shape}"
        shown = shown.removeprefix("builtins.")
        raise InputError(f"{what} is {shown}: it must be a NumPy array of shape {queries.shape}")
    numbers = bound.dtype.kind in "iu" or (
        bound.dtype == object and all(isinstance(number, int) and not isinstance(number, bool) for number in bound)
    )
    if not numbers:
        raise InputError(f"{what} is of {bound.dtype}: bounds are integers, and np.iinfo(np.int64).max is no limit")
    if len(before := np.flatnonzero(bound < 0)):
        at = int(before[0])
        raise InputError(
            f"{what} is {bound[at]} for query {queries[at]}, before the sequence: positions begin at 0, "
            "np.maximum(..., 0) keeps bounds there"
        )
    return (bound if np.can_cast(bound.dtype, np.int64) else np.minimum(bound, END)).astype(np.int64)
