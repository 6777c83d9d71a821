"""Options of `forward` beside q, k, v, on which the ranks agree in the collective that describes q, k, v."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from .. import arrays
from ..arrays import Array
from ..errors import InputError
from ..problems.dropout import Dropout

NONE, FITS, WRONG = 0, 1, 2


class Given(TypedDict, total=False):
    """Options that `forward` takes beside q, k, v; see `base.Attention.forward`."""

    sinks: Array | None
    dropout: Dropout | None


def numbered(q: Array, given: Given) -> list[int]:
    """Return as integers what a rank is given beside q, k, v.

    Whether there is an argument that nobody knows, whether sinks fit q, their checksum, and `drawn`.
    """
    unknown = int(bool(set(given) - set(Given.__annotations__)))
    sinks, dropout = given.get("sinks"), given.get("dropout")
    if sinks is None:
        return [unknown, NONE, 0, *drawn(dropout)]
    shape, _ = arrays.described(arrays.describe(q)) or ((), None)
    fits = arrays.described(arrays.describe(sinks)) in [(shape[1:2], dtype) for dtype in arrays.FLOATS]
    alike = fits and arrays.namespace(sinks) is arrays.namespace(q)
    return [unknown, FITS if alike else WRONG, checksum(sinks), *drawn(dropout)]


def drawn(dropout: Dropout | None) -> list[int]:
    """Return as integers whether there is dropout, its rate and its seed."""
    if dropout is None:
        return [NONE, 0, 0]
    if not isinstance(dropout, Dropout):
        return [WRONG, 0, 0]
    return [
        FITS,
        *np.array([dropout.rate]).view(np.int64).tolist(),
        *np.array([dropout.seed], np.uint64).view(np.int64),
    ]


def checksum(array: Array) -> int:
    """Return a number that differs where an array does; 0 of arrays that aren't in the memory of the host."""
    return zlib.crc32(array.tobytes()) if isinstance(array, np.ndarray) else 0


def agreed_given(rows: Sequence[Sequence[int]], alike: bool = True) -> None:
    """Raise InputError where what the ranks are given beside q, k, v does not fit or differs.

    Parameters
    ----------
    rows : for each rank, what `numbered` returned
    alike : bool
        Whether sinks must be the same on all ranks.
    """
    for rank, (unknown, sinks, numbers, *dropout) in enumerate(rows):
        if unknown:
            raise InputError(
                f"forward was given an argument on rank {rank} that it does not take: it takes q, k, v, sinks and "
                "dropout; mask, scale, layout and the like are given where the attention is built"
            )
        if sinks == WRONG:
            raise InputError(
                f"sinks on rank {rank} must be an array like q with a number for each of its heads, "
                f"of {', '.join(arrays.FLOAT_NAMES)}"
            )
        if dropout[0] == WRONG:
            raise InputError(f"dropout on rank {rank} must be a mpiattn.Dropout(rate, seed)")
        if sinks != rows[0][1] or (alike and numbers != rows[0][2]):
            raise InputError(f"sinks on rank {rank} are others than on rank 0")
        if dropout != rows[0][3:]:
            raise InputError(f"dropout on rank {rank} is another than on rank 0")
