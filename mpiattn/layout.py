"""Layouts: which global token positions each rank owns, for any token count and any number of ranks.

A chunk is described by its explicit positions, ascending, never by `length // n`, so uneven lengths and
empty ranks need no special case anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import DESCRIPTION, DTYPES, Parcel, describe, described
from .message import Communicator, InputError, Tag, Waitall

Positions = NDArray[np.int64]


def _runs(tokens: int, runs: int, run: int) -> Positions:
    """Return run number `run` of a sequence cut into `runs` consecutive runs, as even as can be."""
    return np.arange(run * tokens // runs, (run + 1) * tokens // runs, dtype=np.int64)


def contiguous(tokens: int, ranks: int, rank: int) -> Positions:
    """One run a rank, in rank order."""
    return _runs(tokens, ranks, rank)


def zigzag(tokens: int, ranks: int, rank: int) -> Positions:
    """Two runs a rank, one from each end: a causal mask then gives every rank the same work.

    Rank i owns runs i and 2n-1-i of 2n (as in Llama 3's training, arXiv 2407.21783, section 3.3.2).
    """
    return np.concatenate([_runs(tokens, 2 * ranks, rank), _runs(tokens, 2 * ranks, 2 * ranks - 1 - rank)])


def striped(tokens: int, ranks: int, rank: int) -> Positions:
    """Every n-th token, starting at the rank (Striped Attention, arXiv 2311.09431)."""
    return np.arange(rank, tokens, ranks, dtype=np.int64)


LAYOUTS: dict[str, Callable[[int, int, int], Positions]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
}


def check(layout: str) -> str:
    """Return the layout's name, or raise ValueError with the names there are."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    return layout


def positions(layout: str, tokens: int, ranks: int, rank: int) -> Positions:
    """Return the global positions that `rank` owns, ascending.

    Parameters
    ----------
    layout : str
        A name in `LAYOUTS`.
    tokens : int
        Length of the whole sequence.
    ranks, rank : int
        How many ranks share it, and which one is meant.

    Returns
    -------
    int64, (tokens of this rank,)
    """
    return LAYOUTS[check(layout)](tokens, ranks, rank)


def scatter(
    array: NDArray[Any] | None, comm: Communicator, layout: str, root: int = 0, axis: int = 2
) -> NDArray[Any]:
    """Give each rank its tokens of an array that the root holds.

    Parameters
    ----------
    array : (batch, heads, tokens, head_dim) on the root, None elsewhere
        Any array with tokens along `axis`, of a dtype in `arrays.DTYPES`.
    comm : mpi4py.MPI.Comm
    layout : {"contiguous", "zigzag", "striped"}
    root : int
    axis : int
        Axis of the tokens.

    Returns
    -------
    This rank's tokens, contiguous in memory, in the order of their positions.

    Raises
    ------
    InputError
        On every rank, where the layout is unknown or the root has no such array.
    """
    check(layout)
    size, rank = comm.Get_size(), comm.Get_rank()
    description = describe(array)
    comm.Bcast(description, root)
    spec = described(description)
    if spec is None or not -len(spec[0]) <= axis < len(spec[0]):
        raise InputError(f"rank {root} must give an array with an axis {axis}, of {', '.join(map(str, DTYPES))}")
    shape, dtype = list(spec[0]), spec[1]
    owned = [positions(layout, shape[axis], size, owner) for owner in range(size)]
    shape[axis] = len(owned[rank])
    part = Parcel([(tuple(shape), dtype)])
    requests = [comm.Irecv(part.message, root, Tag.SCATTER)]
    if array is not None and rank == root:
        for dest in range(size):
            chunk = np.take(array, owned[dest], axis)
            leaving = Parcel([(chunk.shape, dtype)])
            leaving.pack(chunk)
            requests.append(comm.Isend(leaving.message, dest, Tag.SCATTER))
    Waitall(requests)
    return part.arrays[0]


def gather(
    array: NDArray[Any], comm: Communicator, layout: str, root: int = 0, axis: int = 2
) -> NDArray[Any] | None:
    """Collect each rank's tokens on the root: the inverse of `scatter`.

    Parameters
    ----------
    array : (batch, heads, tokens, head_dim)
        This rank's tokens; the shapes of all ranks agree but for `axis`.

    Returns
    -------
    The whole array on the root, None elsewhere.

    Raises
    ------
    InputError
        On every rank, where the arrays do not make up a sequence in that layout.
    """
    check(layout)
    size, rank = comm.Get_size(), comm.Get_rank()
    table = np.empty((size, DESCRIPTION), np.int64)
    comm.Allgather(describe(array), table)
    specs = [described(row) for row in table]
    shapes = [list(spec[0]) if spec and -len(spec[0]) <= axis < len(spec[0]) else [] for spec in specs]
    total = sum(shape[axis] for shape in shapes if shape)
    owned = [positions(layout, total, size, owner) for owner in range(size)]
    for owner, (spec, shape) in enumerate(zip(specs, shapes, strict=True)):
        if spec is None or not shape:
            raise InputError(f"rank {owner} must give an array with an axis {axis}, of {', '.join(map(str, DTYPES))}")
        expected = [*shapes[0]]
        expected[axis] = len(owned[owner])
        if shape != expected or spec[1] != specs[0][1]:  # type: ignore[index]
            raise InputError(
                f"rank {owner} has {spec[1]} {tuple(shape)}; the {layout} layout of {total} tokens over {size} "
                f"ranks, as on rank 0, takes {specs[0][1]} {tuple(expected)}"  # type: ignore[index]
            )
    dtype = specs[0][1]  # type: ignore[index]
    own = Parcel([(array.shape, dtype)])
    own.pack(array)
    requests = []
    arriving = [Parcel([(tuple(shape), dtype)]) for shape in shapes] if rank == root else []
    for source, part in enumerate(arriving):
        requests.append(comm.Irecv(part.message, source, Tag.GATHER))
    requests.append(comm.Isend(own.message, root, Tag.GATHER))
    Waitall(requests)
    if rank != root:
        return None
    shape = [*shapes[0]]
    shape[axis] = total
    whole = np.empty(shape, dtype)
    for part, places in zip(arriving, owned, strict=True):
        np.moveaxis(whole, axis, 0)[places] = np.moveaxis(part.arrays[0], axis, 0)
    return whole
