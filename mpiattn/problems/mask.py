"""Masks: which keys a query may attend to, as one interval of global positions per query.

A query at global position p sees the keys whose positions lie in [lo(p), hi(p)). Everything else
follows from these two numbers: whether a block is empty, full or partial, how many pairs it has, and
which blocks nobody needs. As they are evaluated on global positions, every layout is right by
construction. lo and hi never decrease with p. Masks of a user's own: see `user_mask`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .scalars import plain, shown, whole

Positions = NDArray[np.int64]

END = int(np.iinfo(np.int64).max)
"""A bound that is no limit; positions are less."""


class Mask:
    """A mask: the keys that each query attends to, as one interval of positions; the base of masks of your own.

    A mask of your own has a method `bounds`, and may have the others. For each problem it is asked once, for all
    queries; what does not keep to the contract below raises the same InputError on every rank. A prefix-LM mask:

        class PrefixLM(mpiattn.Mask):
            def __init__(self, prefix):
                self.prefix = prefix

            def bounds(self, queries):
                return np.zeros_like(queries), np.maximum(queries + 1, self.prefix)

    Masks are joined by `&`.
    """

    def bounds(self, queries: Positions) -> tuple[Any, Any]:
        """Return lo and hi: each query attends to the keys at positions in [lo, hi).

        Parameters
        ----------
        queries : int64, (tokens,)
            Positions in the whole sequence, ascending, not always consecutive: the bounds of a query depend on its own
            position only.

        Returns
        -------
        lo, hi : integers, (tokens,)
            0 or more. Neither decreases from a query to a later one. A query with hi <= lo attends to nothing; beyond
            the last key a bound of any size means no limit.
        """
        raise NotImplementedError

    def check(self, query_tokens: int, key_tokens: int) -> None:
        """Raise ValueError where this mask does not fit sequences of that many tokens; by default it fits all."""

    @property
    def causal(self) -> bool:
        """Whether no query attends to a later key, whatever the positions."""
        return False

    @property
    def windowed(self) -> bool:
        """Whether queries attend to keys near them only, however long the sequence."""
        return False

    def __and__(self, other: Mask) -> Mask:
        return Intersection(self, other) if isinstance(other, Mask) else NotImplemented


@dataclass(frozen=True)
class Full(Mask):
    """Every query attends to every key."""

    def __str__(self) -> str:
        return "full"

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        return np.zeros_like(queries), np.full_like(queries, END)


@dataclass(frozen=True)
class Causal(Mask):
    """A query attends to keys at its own position and before."""

    causal = True

    def __str__(self) -> str:
        return "causal"

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        return np.zeros_like(queries), np.minimum(queries, END - 1) + 1


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query at p attends to the keys at p - left .. p + right; `right=0` makes it causal.

    Parameters
    ----------
    left, right : int, or math.inf
        Tokens, 0 or more. What reaches beyond the sequence has no limit, whatever its size; from 2**63 - 1 on it is
        kept as math.inf.

    Raises
    ------
    InputError
        A ValueError, where one is anything else.
    """

    left: float
    right: float = 0

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            given = plain(getattr(self, name))
            reach = given if isinstance(given, float) and given == math.inf else whole(given, floats=True)
            if reach is None or reach < 0:
                raise InputError(
                    "a window reaches 0 or more tokens each way, a whole number of them, or math.inf for no limit, "
                    f"got {name}={shown(given)}"
                )
            object.__setattr__(self, name, reach if reach < END else math.inf)

    def __str__(self) -> str:
        return f"window={self.left},{self.right}"

    @property
    def causal(self) -> bool:
        """Whether it does not reach to the right."""
        return self.right == 0

    @property
    def windowed(self) -> bool:
        """Whether it has an end on both sides."""
        return max(self.left, self.right) < math.inf

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        left, right = (int(min(reach, END)) for reach in (self.left, self.right))
        # Neither difference nor sum leaves int64: positions are 0 or more, and bounds end at END.
        return np.maximum(queries - left, 0), queries + np.minimum(right, END - 1 - queries) + 1


@dataclass(frozen=True, init=False)
class Documents(Mask):
    """Documents packed one after the other: a token attends inside its own document.

    Parameters
    ----------
    lengths : iterable of int
        Tokens of each, 0 or more, not cumulative; together those of the sequence. Taken once, as a tuple.

    Raises
    ------
    InputError
        A ValueError, where they are anything else.
    """

    lengths: tuple[int, ...]

    def __init__(self, lengths: Iterable[int]) -> None:
        try:
            given = tuple(lengths)
        except TypeError:
            raise InputError(f"Documents takes the lengths of documents, such as [5, 7], got {lengths!r}") from None
        numbers = []
        for length in given:
            number = whole(length, floats=True)
            if number is None or number < 0:
                raise InputError(
                    f"document lengths are whole numbers, 0 or more, in one axis or iterable, got {shown(length)}"
                )
            numbers.append(number)
        object.__setattr__(self, "lengths", tuple(numbers))

    def __str__(self) -> str:
        return f"documents={','.join(map(str, self.lengths))}"

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        ends = np.cumsum(self.lengths, dtype=np.int64)
        document = np.searchsorted(ends, queries, side="right")
        return (ends - self.lengths)[document], ends[document]

    def check(self, query_tokens: int, key_tokens: int) -> None:
        total = sum(self.lengths)
        for tokens in (query_tokens, key_tokens):
            if total != tokens:
                raise InputError(
                    f"the documents hold {shown(total)} tokens, the sequence has {tokens}{self._hint(tokens)}"
                )

    def _hint(self, tokens: int) -> str:
        """Return what to write instead where the lengths look cumulative."""
        ends = [0, *self.lengths] if self.lengths[:1] != (0,) else list(self.lengths)
        if ends[-1] != tokens or ends != sorted(ends):
            return ""
        lengths = [str(end - begin) for begin, end in itertools.pairwise(ends)]
        shown = ", ".join(lengths[:8]) + (", ..." if len(lengths) > 8 else "")
        return f": these look like cumulative lengths; Documents takes the length of each, here {shown}"


@dataclass(frozen=True)
class Intersection(Mask):
    """The keys that two masks both allow, written `Documents(lengths) & Causal()`."""

    first: Mask
    second: Mask

    def __str__(self) -> str:
        return f"{self.first}+{self.second}"

    @property
    def causal(self) -> bool:
        """Whether one of the two is."""
        return self.first.causal or self.second.causal

    @property
    def windowed(self) -> bool:
        """Whether one of the two is."""
        return self.first.windowed or self.second.windowed

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        (lo, hi), (other_lo, other_hi) = self.first.bounds(queries), self.second.bounds(queries)
        return np.maximum(lo, other_lo), np.minimum(hi, other_hi)

    def check(self, query_tokens: int, key_tokens: int) -> None:
        self.first.check(query_tokens, key_tokens)
        self.second.check(query_tokens, key_tokens)


def allowed(mask: Mask, queries: Positions, keys: Positions) -> NDArray[np.bool_]:
    """Return the mask as an array of (queries, keys), true where a query attends to a key."""
    lo, hi = mask.bounds(queries)
    result: NDArray[np.bool_] = (keys >= lo[:, None]) & (keys < hi[:, None])
    return result


MASKS: dict[str, Callable[..., Mask]] = {
    "full": Full,
    "causal": Causal,
    "window": SlidingWindow,
    "documents": Documents,
}

FORMS = "full, causal, window=LEFT[,RIGHT] (inf: no limit), documents=LENGTH,LENGTH,..., or several joined by +"
"""The texts that `parse` takes."""

HELP = f"{FORMS} (default %(default)s)"
"""Forms that the option `--mask` takes."""


def parse(text: str) -> Mask:
    """Return a mask from text; see `FORMS`."""
    masks: list[Mask] = []
    for part in text.split("+"):
        name, _, numbers = part.partition("=")
        try:
            values = [_number(number) for number in numbers.split(",")] if numbers else []
            masks.append(MASKS[name](*([values] if name == "documents" else values)))
        except (KeyError, TypeError, ValueError) as error:
            reason = f": {error}" if isinstance(error, ValueError) else ""
            raise ValueError(f"unknown mask {part!r}{reason}; choose from {FORMS}") from None
    return functools.reduce(operator.and_, masks)


def _number(text: str) -> float:
    """Return a whole number, or inf."""
    try:
        return math.inf if text.strip() == "inf" else int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None


def argument(text: str) -> Mask:
    """Read a mask from the command line."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
