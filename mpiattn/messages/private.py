"""The private duplicate of a caller's communicator, on which this package's messages never meet the caller's.

It is made once for each communicator and kept there by an attribute, as PETSc does with its inner communicators; with
it are kept the grids, rows and columns that algorithms make of it. So building an algorithm again costs none of the
library's communicators, of which there are some thousands. All go when the caller frees the communicator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mpi4py import MPI

if TYPE_CHECKING:
    from typing_extensions import Self

Made = TypeVar("Made", bound="PrivateComm")

ABANDONED: list[tuple[object, object]] = []
"""Communicators and memory that messages under way may still use; nobody can say when they end."""

Key = tuple[object, ...]

PAGE = 4096  # bytes


class Kept:
    """Communicators made of a private one, each once, and those that carry device memory over it."""

    def __init__(self) -> None:
        self.made: dict[Key, PrivateComm] = {}
        self.windows: dict[int, MPI.Win] = {}
        self.carriers: dict[str, Any] = {}

    def once(self, key: Key, make: Callable[[], Made]) -> Made:
        """Return what was made for that key, made now if it was not; all ranks ask in the same order."""
        if key not in self.made:
            self.made[key] = make()
        return cast("Made", self.made[key])

    def window(self, nbytes: int, comm: MPI.Intracomm) -> MPI.Win:
        """Return the window with so many bytes for each rank, made now if there is none."""
        if nbytes not in self.windows:
            self.windows[nbytes] = MPI.Win.Allocate_shared(nbytes, comm=comm)
        return self.windows[nbytes]

    def free(self) -> None:
        """Free the windows and the communicators that were made."""
        for window in self.windows.values():
            window.Free()
        self.windows.clear()
        for comm in reversed(self.made.values()):
            comm.kept.free()
            MPI.Comm.Free(comm)
        self.made.clear()
        self.carriers.clear()


class PrivateComm(MPI.Intracomm):
    """A private communicator: as `MPI.Intracomm`, but it makes each grid and each part of itself once.

    Attributes
    ----------
    kept : Kept
    owner : MPI.Intracomm, optional
        The caller's communicator of which this is the duplicate, or the private one that this was made of.
    """

    kept: Kept
    owner: MPI.Intracomm | None

    def __new__(cls, comm: MPI.Intracomm) -> Self:
        """Take over a communicator."""
        self = MPI.Intracomm.__new__(cls, comm)
        self.kept, self.owner = Kept(), None
        return self

    def Create_cart(
        self, dims: Sequence[int], periods: Sequence[bool] | None = None, reorder: bool = False
    ) -> PrivateCart:
        """Return the grid of these dimensions."""
        make = partial(MPI.Intracomm.Create_cart, self, dims, periods, reorder)
        key = "Create_cart", tuple(dims), tuple(periods or ()), reorder
        return self.kept.once(key, lambda: self.owned(PrivateCart(make())))

    def Split(self, color: int = 0, key: int = 0) -> PrivateComm:
        """Return the communicator of the ranks of this color, in the order of their keys."""
        make = partial(MPI.Comm.Split, self, color, key)
        asked = self.allgather((color, key))  # one that only some ranks ask for anew is another one for all
        return self.kept.once(("Split", *asked), lambda: self.owned(PrivateComm(cast(MPI.Intracomm, make()))))

    def owned(self, made: Made) -> Made:
        """Return a communicator that was made of this one, as its own."""
        made.owner = self
        return made

    def Free(self) -> None:
        """Do nothing: it is freed with the caller's communicator."""

    def Revoke(self) -> None:
        """Revoke it and all that was made of it: MPI revokes one at a time."""
        for comm in self.kept.made.values():
            comm.Revoke()
        MPI.Comm.Revoke(self)

    def Allocate_shared(self, nbytes: int) -> MPI.Win:
        """Return a window with a part of at least so many bytes for each rank of a host.

        Attentions whose passes follow each other share one: it is as large as the largest part, rounded up to a power
        of two, so that there are few.
        """
        most: int = max(self.allgather(max(nbytes, PAGE)))
        return self.kept.window(1 << (most - 1).bit_length(), self)

    def private(self) -> Self:
        """Return this communicator."""
        return self

    def abandon(self, memory: object) -> None:
        """Take it out of its owner's keeping: there may be messages under way on it for ever, of this memory."""
        ABANDONED.append((self, memory))
        owner, self.owner = self.owner, None
        if isinstance(owner, PrivateComm):
            owner.abandon(memory)
        elif owner is not None and owner != MPI.COMM_NULL and owner.Get_attr(KEYVAL) is self:
            owner.Delete_attr(KEYVAL)


class PrivateCart(PrivateComm, MPI.Cartcomm):
    """A private grid, or a row or a column of one."""

    def Sub(self, remain_dims: Sequence[bool]) -> PrivateCart:
        """Return the communicator of this rank's row or column."""
        make = partial(MPI.Cartcomm.Sub, self, remain_dims)
        return self.kept.once(("Sub", tuple(remain_dims)), lambda: self.owned(PrivateCart(make())))


def _freed(comm: MPI.Comm, keyval: int, duplicate: PrivateComm) -> None:
    """Free all that was kept, when the caller frees the communicator; what was abandoned is left to itself."""
    if duplicate.owner is not None:
        duplicate.kept.free()
        MPI.Comm.Free(duplicate)


KEYVAL = MPI.Comm.Create_keyval(delete_fn=_freed)


def duplicate(comm: MPI.Intracomm) -> PrivateComm:
    """Return the private duplicate of a communicator: the one kept with it, or a new one; all its ranks call this."""
    kept = comm.Get_attr(KEYVAL)
    if not isinstance(kept, PrivateComm):
        kept = PrivateComm(comm.Dup())
        kept.owner = comm
        comm.Set_attr(KEYVAL, kept)
    return kept
