"""The ranks' shares of a whole array: where they lie in it, and the way there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..arrays import DTYPES, Array, Spec, describe, described, namespace, told
from ..arrays.operations import operations
from ..arrays.places import Places
from ..errors import InputError
from ..messages.connection import private, rows
from ..messages.message import Communicator, Tag, Waitall
from ..messages.parcel import Parcel
from ..problems import layout as layouts
from ..problems.scalars import shown, whole
from .options import agree, alike
from .posed import show

Where = Callable[[tuple[int, ...], int], Any]
"""A function of a whole array's shape and a rank: the index at which the rank's share lies."""


def by_tokens(layout: str | Where, ranks: int, axis: int = 2) -> Where:
    """Return the function of a layout, whose tokens lie along an axis; a function given in its place as it is."""
    if not isinstance(layout, str):
        return layout

    def where(shape: tuple[int, ...], rank: int) -> Any:
        return (*[slice(None)] * (axis % len(shape)), layouts.positions(layout, shape[axis], ranks, rank))

    return where


def owned_heads(place: Sequence[slice]) -> slice:
    """Return which heads a rank's share has, as a slice, from where it lies in a whole array of four axes."""
    return place[1] if len(place) > 1 else slice(None)


def scatter(array: Array | None, comm: Communicator, layout: str | Where, root: int = 0, axis: int = 2) -> Array:
    """Give each rank its share of an array that the root holds, without pickling.

    Parameters
    ----------
    array : (batch, heads, tokens, head_dim) on the root, None elsewhere
        Any array with tokens along `axis`, of a dtype in `arrays.DTYPES`.
    comm : mpi4py.MPI.Comm
    layout : {"contiguous", "zigzag", "striped"}, or a function
        Which tokens each rank owns, such as an attention's `layout`; or a function of the shape and a rank, such as
        `Attention.owned` makes it for arrays that are not shared out by tokens.
    root : int
    axis : int
        Axis of the tokens.

    Returns
    -------
    This rank's share, contiguous in memory; tokens in the order of their positions.

    Raises
    ------
    InputError
        On every rank, where the layout is unknown or the root has no such array, or layout, root or axis differ
        between ranks.
    """
    comm = private(comm)  # the caller's messages never meet these
    size, rank = comm.Get_size(), comm.Get_rank()
    where, root, axis = _agreed(comm, layout, root, axis)
    description = np.array(describe(array))
    comm.Bcast(description, root)
    shape, dtype = _with_axis(comm, axis, description, root, array)
    own = Parcel([(_share(shape, where, rank), dtype)])
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
    array: Array,
    comm: Communicator,
    layout: str | Where,
    root: int = 0,
    axis: int = 2,
    shape: tuple[int, ...] | None = None,
    copies: bool = False,
) -> Array | None:
    """Collect each rank's share on the root, without pickling: the inverse of `scatter`.

    Parameters
    ----------
    array : (batch, heads, tokens, head_dim)
        This rank's share; the shapes of all ranks agree but for `axis`.
    comm, layout, root, axis
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
        On every rank, where the shares do not make up a whole in that layout, or an argument differs between ranks.
    """
    comm = private(comm)  # the caller's messages never meet these
    size, rank = comm.Get_size(), comm.Get_rank()
    where, root, axis = _agreed(comm, layout, root, axis, shape)
    table = rows(comm, np.array(describe(array)))
    specs = [_with_axis(comm, axis, description, owner, array) for owner, description in enumerate(table)]
    first, dtype = specs[0]
    if shape is not None and len(shape) != len(first):
        raise InputError(f"the whole is to be {shape}, and rank 0 has {dtype} {first}: they must have as many axes")
    if shape is None:
        lengths = [*first]
        lengths[axis] = sum(part[axis] for part, _ in specs)
        shape = tuple(lengths)
    for owner, spec in enumerate(specs):
        expected = _share(shape, where, owner), dtype
        if spec != expected:
            raise InputError(
                f"rank {owner} has {spec[1]} {spec[0]}; its share of {shape} over {size} ranks is {dtype} {expected[0]}"
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
    result = np.zeros(shape, dtype)
    for owner, part in enumerate(arriving):
        place = where(shape, owner)
        result[place] = part.arrays[0] if copies else result[place] + part.arrays[0]
    return result


def _agreed(
    comm: Communicator, layout: object, root: object, axis: object, shape: object = None
) -> tuple[Where, int, int]:
    """Return the function of a layout, the root and the axis; raise the same InputError on all ranks; one collective.

    Functions can't be compared: that all ranks give one is all that is asked.
    """
    given: Any = FUNCTION if callable(layout) else layout
    lengths = shape if isinstance(shape, tuple | list) else (shape,)
    agree(comm, partial(_check, given, root, axis, comm.Get_size()), partial(alike, *lengths))
    axis = whole(axis) or 0
    return by_tokens(cast("str | Where", layout), comm.Get_size(), axis), whole(root) or 0, axis


FUNCTION = "a function"


def _check(layout: str, root: object, axis: object, ranks: int) -> None:
    """Raise ValueError where that is no layout, root or axis."""
    if layout != FUNCTION:
        layouts.check(layout, ranks)
    number = whole(root)
    if number is None or not 0 <= number < ranks:
        raise ValueError(f"root is one of the {ranks} ranks, from 0, got {shown(root)}")
    if whole(axis) is None:
        raise ValueError(f"axis is a whole number, got {shown(axis)}")


def _with_axis(comm: Communicator, axis: int, description: NDArray[np.int64], rank: int, own: object) -> Spec:
    """Return the shape and dtype of the array that a rank describes, or raise InputError; all ranks know all of it."""
    spec = described(description)
    if spec is None or not -len(spec[0]) <= axis < len(spec[0]):
        given = comm.bcast(told(own), rank) if spec is None else show(spec)
        raise InputError(
            f"rank {rank} must give an array with an axis {axis}, of {', '.join(map(str, DTYPES))}: it gives {given}"
        )
    return spec


def _share(shape: tuple[int, ...], where: Where, rank: int) -> tuple[int, ...]:
    """Return the shape of a rank's share of a whole of that shape."""
    outline = np.broadcast_to(np.empty(1), shape)
    return outline[where(shape, rank)].shape


def join(parts: Sequence[Array], places: Sequence[Places]) -> Array:
    """Put chunks in the order of their positions; tokens are on axis 2."""
    shape = [*parts[0].shape]
    shape[2] = sum(map(len, places))
    whole: Array = namespace(parts[0]).empty(shape, parts[0].dtype)
    for part, where in zip(parts, places, strict=True):
        operations(whole).put(whole, where, part)
    return whole
