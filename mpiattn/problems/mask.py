"""Masks: which keys a query may attend to, as one interval of global positions per query.

A query at global position p sees the keys whose positions lie in [lo(p), hi(p)). Everything else
follows from these two numbers: whether a block is empty, full or partial, how many pairs it has, and
which blocks nobody needs. As they are evaluated on global positions, every layout is right by
construction. lo and hi never decrease with p.
"""

from __future__ import annotations

import argparse
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]

END = np.iinfo(np.int64).max


class Mask:
    """The interval of keys that each query attends to; `str` gives the text that `parse` takes."""

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        """Return lo and hi: each query attends to the keys at positions in [lo, hi).

        Parameters
        ----------
        queries : int64, (tokens,)
            Global positions, ascending.

        Returns
        -------
        lo, hi : int64, (tokens,)
            Neither ever decreases.
        """
        raise NotImplementedError

    def check(self, query_tokens: int, key_tokens: int) -> None:
        """Raise ValueError where this mask does not fit sequences of that many tokens."""

    @property
    def causal(self) -> bool:
        """Whether no query attends to a later key, whatever the positions."""
        return False

    @property
    def windowed(self) -> bool:
        """Whether queries attend to keys near them only, however long the sequence."""
        return False

    def __and__(self, other: Mask) -> Mask:
        return Intersection(self, other)


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
        return np.zeros_like(queries), queries + 1


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query at p attends to the keys at p - left .. p + right; `right=0` makes it causal.

    Parameters
    ----------
    left, right : int
        Tokens, 0 or more.

    Raises
    ------
    ValueError
        Where one is negative.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        if self.left < 0 or self.right < 0:
            raise ValueError(f"a window reaches 0 or more tokens each way, got {self.left} and {self.right}")

    def __str__(self) -> str:
        return f"window={self.left},{self.right}"

    @property
    def causal(self) -> bool:
        """Whether it does not reach to the right."""
        return self.right == 0

    @property
    def windowed(self) -> bool:
        """True."""
        return True

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        return np.maximum(queries - self.left, 0), queries + self.right + 1


@dataclass(frozen=True, init=False)
class Documents(Mask):
    """Documents packed one after the other: a token attends inside its own document.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each, 0 or more; together those of the sequence.

    Raises
    ------
    ValueError
        Where one is negative.
    """

    lengths: tuple[int, ...]

    def __init__(self, lengths: Sequence[int]) -> None:
        if any(length < 0 for length in lengths):
            raise ValueError(f"document lengths are 0 or more, got {list(lengths)}")
        object.__setattr__(self, "lengths", tuple(int(length) for length in lengths))

    def __str__(self) -> str:
        return f"documents={','.join(map(str, self.lengths))}"

    def bounds(self, queries: Positions) -> tuple[Positions, Positions]:
        ends = np.cumsum(self.lengths, dtype=np.int64)
        document = np.searchsorted(ends, queries, side="right")
        return (ends - self.lengths)[document], ends[document]

    def check(self, query_tokens: int, key_tokens: int) -> None:
        for tokens in (query_tokens, key_tokens):
            if sum(self.lengths) != tokens:
                raise ValueError(f"the documents hold {sum(self.lengths)} tokens, the sequence has {tokens}")


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

FORMS = "full, causal, window=LEFT[,RIGHT], documents=LENGTH,LENGTH,..., or several joined by +"
"""The texts that `parse` takes."""

HELP = f"{FORMS} (default %(default)s)"
"""Of an option `--mask`."""


def parse(text: str) -> Mask:
    """Return a mask from text; see `FORMS`."""
    masks: list[Mask] = []
    for part in text.split("+"):
        name, _, numbers = part.partition("=")
        try:
            values = [int(number) for number in numbers.split(",")] if numbers else []
            masks.append(MASKS[name](*([values] if name == "documents" else values)))
        except (KeyError, TypeError, ValueError) as error:
            reason = f": {error}" if isinstance(error, ValueError) else ""
            raise ValueError(f"unknown mask {part!r}{reason}; choose from {FORMS}") from None
    return functools.reduce(operator.and_, masks)


def argument(text: str) -> Mask:
    """Read a mask from the command line."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
