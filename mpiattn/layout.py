"""Layouts: which global token positions each rank owns, for any token count and any number of ranks.

A chunk is described by its explicit positions, ascending, never by `length // n`, so uneven lengths and
empty ranks need no special case anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import DESCRIPTION, DTYPES, Parcel, describe, described, namespace, put
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


EVERYWHERE = "everywhere"
"""Layout of an algorithm that gives every rank all tokens, of some of the heads; see `heads`."""


def check(layout: str, ranks: int = 0) -> str:
    """Return the layout's name, or raise ValueError with the names there are."""
    name, _, parts = layout.partition("/")
    if name not in LAYOUTS or not (parts or "1").isdecimal() or int(parts or 1) < 1:
        raise ValueError(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    if ranks % int(parts or 1):
        raise ValueError(f"layout {layout!r} takes a multiple of {parts} ranks, not {ranks}")
    return layout


def positions(layout: str, tokens: int, ranks: int, rank: int) -> Positions:
    """Return the global positions that `rank` owns, ascending.

    Parameters
    ----------
    layout : str
        A name in `LAYOUTS`, for ranks that each own a chunk of their own; or "zigzag/2", for chunks that 2
        neighbours share: each has a run of them, as even as can be.
    tokens : int
        Length of the whole sequence.
    ranks, rank : int
        How many ranks share it, and which one is meant.

    Returns
    -------
    int64, (tokens of this rank,)
    """
    if layout == EVERYWHERE:
        return np.arange(tokens, dtype=np.int64)
    name, _, number = check(layout, ranks).partition("/")
    parts = int(number or 1)
    chunk = LAYOUTS[name](tokens, ranks // parts, rank // parts)
    return chunk[_runs(len(chunk), parts, rank % parts)]


def heads(count: int, kv_count: int, ranks: int, rank: int) -> tuple[slice, slice]:
    """Return the query heads and the K/V heads of `rank`, for algorithms that spread heads over ranks.

    K/V heads are cut as even as can be, and their query heads with them. Where they are fewer than ranks,
    neighbours share a K/V head and cut its query heads; what is left without any has no K/V head either.
    """
    group = count // kv_count
    if ranks <= kv_count:
        first, last = rank * kv_count // ranks, (rank + 1) * kv_count // ranks
        return slice(first * group, last * group), slice(first, last)
    head = rank * kv_count // ranks
    begin, end = (-(-h * ranks // kv_count) for h in (head, head + 1))  # the ranks that share the K/V head
    first, last = ((place - begin) * group // (end - begin) for place in (rank, rank + 1))
    return slice(head * group + first, head * group + last), slice(head, head + (last > first))


def join(parts: Sequence[NDArray[Any]], positions: Sequence[Positions]) -> NDArray[Any]:
    """Put chunks in the order of their positions; tokens are on axis 2."""
    shape = [*parts[0].shape]
    shape[2] = sum(map(len, positions))
    whole: NDArray[Any] = namespace(parts[0]).empty(shape, parts[0].dtype)
    for part, where in zip(parts, positions, strict=True):
        put(whole, where, part)
    return whole


def owned_heads(place: Any) -> Any:
    """Return which heads a rank's share has, as a slice, from where it lies in a whole array of four axes."""
    return place[1] if len(place) > 1 else slice(None)


Where = Callable[[tuple[int, ...], int], Any]
"""Where a rank's share of a whole array lies: called with the whole's shape and the rank, returns an index."""


def scatter(
    array: NDArray[Any] | None, comm: Communicator, layout: str | Where, root: int = 0, axis: int = 2
) -> NDArray[Any]:
    """Give each rank its share of an array that the root holds, without pickling.

    Parameters
    ----------
    array : (batch, heads, tokens, head_dim) on the root, None elsewhere
        Any array with tokens along `axis`, of a dtype in `arrays.DTYPES`.
    comm : mpi4py.MPI.Comm
    layout : {"contiguous", "zigzag", "striped"}, or a function
        Which tokens each rank owns; or a function of the shape and a rank, such as `Attention.owned` makes
        it for arrays that are not shared out by tokens.
    root : int
    axis : int
        Axis of the tokens.

    Returns
    -------
    This rank's share, contiguous in memory; tokens in the order of their positions.

    Raises
    ------
    InputError
        On every rank, where the layout is unknown or the root has no such array.
    """
    size, rank = comm.Get_size(), comm.Get_rank()
    where = by_tokens(layout, size, axis) if isinstance(layout, str) else layout
    description = describe(array)
    comm.Bcast(description, root)
    spec = described(description)
    if spec is None or not -len(spec[0]) <= axis < len(spec[0]):
        raise InputError(f"rank {root} must give an array with an axis {axis}, of {', '.join(map(str, DTYPES))}")
    shape, dtype = spec
    own = Parcel([(np.broadcast_to(np.empty(1), shape)[where(shape, rank)].shape, dtype)])
    requests = [comm.Irecv(own.message, root, Tag.SCATTER)]
    if array is not None and rank == root:
        for dest in range(size):
            share = array[where(shape, dest)]
            leaving = Parcel([(share.shape, dtype)])
            leaving.pack(share)
            requests.append(comm.Isend(leaving.message, dest, Tag.SCATTER))
    Waitall(requests)
    return own.arrays[0]


def gather(
    array: NDArray[Any],
    comm: Communicator,
    layout: str | Where,
    root: int = 0,
    axis: int = 2,
    shape: tuple[int, ...] | None = None,
    copies: bool = False,
) -> NDArray[Any] | None:
    """Collect each rank's share on the root, without pickling: the inverse of `scatter`.

    Parameters
    ----------
    array : (batch, heads, tokens, head_dim)
        This rank's share; the shapes of all ranks agree but for `axis`.
    layout, root, axis
        As in `scatter`.
    shape : tuple of int, optional
        Of the whole; needed where layout is a function.
    copies : bool
        Whether shares that overlap are the same there, and count once; else they are added up, as the
        gradients of copies are.

    Returns
    -------
    The whole array on the root, None elsewhere.

    Raises
    ------
    InputError
        On every rank, where the shares do not make up a whole in that layout.
    """
    size, rank = comm.Get_size(), comm.Get_rank()
    where = by_tokens(layout, size, axis) if isinstance(layout, str) else layout
    table = np.empty((size, DESCRIPTION), np.int64)
    comm.Allgather(describe(array), table)
    specs = []
    for owner, spec in enumerate(map(described, table)):
        if spec is None or not -len(spec[0]) <= axis < len(spec[0]):
            raise InputError(f"rank {owner} must give an array with an axis {axis}, of {', '.join(map(str, DTYPES))}")
        specs.append(spec)
    whole_shape, dtype = [*specs[0][0]], specs[0][1]
    if shape is None:
        whole_shape[axis] = sum(part_shape[axis] for part_shape, _ in specs)
    whole_shape = [*(shape or whole_shape)]
    outline = np.broadcast_to(np.empty(1), whole_shape)
    for owner, spec in enumerate(specs):
        expected = outline[where(tuple(whole_shape), owner)].shape
        if spec != (expected, dtype):
            raise InputError(
                f"rank {owner} has {spec[1]} {spec[0]}; its share of {tuple(whole_shape)} over {size} ranks "
                f"is {dtype} {expected}"
            )
    own = Parcel([specs[rank]])
    own.pack(array)
    requests = []
    arriving = [Parcel([spec]) for spec in specs] if rank == root else []
    for source, part in enumerate(arriving):
        requests.append(comm.Irecv(part.message, source, Tag.GATHER))
    requests.append(comm.Isend(own.message, root, Tag.GATHER))
    Waitall(requests)
    if rank != root:
        return None
    whole = np.zeros(whole_shape, dtype)
    for owner, part in enumerate(arriving):
        place = where(tuple(whole_shape), owner)
        whole[place] = part.arrays[0] if copies else whole[place] + part.arrays[0]
    return whole


def by_tokens(layout: str, ranks: int, axis: int = 2) -> Where:
    """Return where each rank's tokens lie along an axis."""
    try:
        check(layout)
    except ValueError as error:
        raise InputError(str(error)) from None

    def where(shape: tuple[int, ...], rank: int) -> Any:
        return (*[slice(None)] * (axis % len(shape)), positions(layout, shape[axis], ranks, rank))

    return where
