"""Double ring attention (LoongTrain, arXiv 2406.18485): fast rings inside the hosts, a slow one between them.

The n ranks form a grid of `outer` rows of `inner` ranks, by default a row for each host. K/V go round the
row, as in Ring Attention, during a window of `inner` steps. Meanwhile the K/V with which the next window
begins come from the row before, so that this message has a whole window to travel. With 2 x 3 ranks:

    step            0     1     2  |  3     4     5
    rank (0, 0)   kv 0  kv 2  kv 1 | kv 3  kv 5  kv 4
    rank (0, 1)   kv 1  kv 0  kv 2 | kv 4  kv 3  kv 5
    rank (0, 2)   kv 2  kv 1  kv 0 | kv 5  kv 4  kv 3     kv 3, 4, 5 leave the ranks (1, 0), (1, 1), (1, 2) at step 0

Backward, K/V go the same ways again. Behind them, one step later, go the partial dK/dV of a window, to which
each rank of the row adds; the last one that adds sends them home, and that message too has a window to travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays import Array, Spec
from ..messages.connection import private
from ..messages.hosts import by_host
from ..messages.message import Cartesian, Communicator, Request, Tag, Testall, Waitall
from ..messages.parcel import Parcel
from ..problems import grid
from ..problems.problem import Problem
from ..problems.travel import Travel, windows
from .base import Attention
from .options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

Posted = tuple[list[Request], list[tuple[Parcel, Parcel]]]
"""Requests, and the pairs (sum, share to be added to it) that they bring."""


class DoubleRingAttention(Attention):
    """Double ring: n-1 messages of K/V forward; n-1 of K/V and n-1 of dK/dV backward, most of them inside a row.

    Parameters
    ----------
    comm, options
        See `Attention`.
    outer : int, optional
        Rows of the grid; divides the number of ranks. By default each host is a row; where hosts hold
        unequally many ranks, rows are as long as the greatest common divisor of their numbers.

    Notes
    -----
    Rows are filled host by host, wherever mpiexec placed the ranks. One row is Ring Attention, and so are
    rows of one rank. On both rings a chunk travels as far as its last user.
    """

    def __init__(self, comm: Communicator, *, outer: int | None = None, **options: Unpack[Options]) -> None:
        comm, self.asked = private(comm), outer
        super().__init__(comm, partial(check, comm.Get_size(), outer), **options)
        self.connect(self.comm)

    def connect(self, comm: Communicator) -> None:
        """Make the grid, its rows filled host by host, and of it this rank's row and column."""
        self.order, near = by_host(comm)
        self.inner = near if self.asked is None else check(comm.Get_size(), self.asked)[1]
        self.outer = len(self.order) // self.inner
        self.ordered = comm.Split(0, self.order.index(comm.Get_rank()))
        self.grid = self.ordered.Create_cart([self.outer, self.inner], periods=[True, True], reorder=False)
        self.row = self.grid.Sub([False, True])
        self.col = self.grid.Sub([True, False])
        self.r, self.c = self.grid.Get_coords(self.grid.Get_rank())

    @classmethod
    def variants(cls, ranks: int) -> list[dict[str, Any]]:
        """Return every number of rows, but for those that make it Ring Attention, if there are others."""
        every = [rows for rows, _ in grid.grids(ranks)]
        return [{"outer": rows} for rows in every if 1 < rows < ranks or len(every) <= 2]

    def plan(self, problem: Problem) -> None:
        """Say whose K/V are here at each step of each window, and how far each chunk travels."""
        at = [self.order[row * self.inner :][: self.inner] for row in range(self.outer)]
        self.rank = at[self.r][self.c]
        self.owners = [[at[self.r - w][self.c - step] for step in range(self.inner)] for w in range(self.outer)]
        down, along = windows(problem.needed, at)
        self.down = [down[owners[0]] for owners in self.owners]
        self.along = [[ways[owner] for owner in owners] for ways, owners in zip(along, self.owners, strict=True)]
        self.back = [ways[self.rank] for ways in along]  # how far this rank's own chunk travels in each window
        specs = [[problem.kv(owner) for owner in owners] for owners in self.owners]
        self.kv = self.slots(self.buffers.parcels, "kv", specs, far=0)
        self.first = [window[0] for window in self.kv]
        self.blocks = [[problem.block(self.rank, owner) for owner in owners] for owners in self.owners]

    def slots(
        self, make: Callable[..., list[Parcel]], name: str, specs: Sequence[Sequence[list[Spec]]], far: int
    ) -> list[list[Parcel]]:
        """Return parcels for each window and step: two buffers take turns, two others at step `far` of the windows.

        What step `far` leaves there is still on its way to another row while the next steps go on.
        """
        fars = make(f"far {name}", [window[far] for window in specs], buffers=2)
        rest = [spec for window in specs for step, spec in enumerate(window) if step != far]
        near = iter(make(f"near {name}", rest, buffers=2))
        return [[fars[w] if step == far else next(near) for step in range(self.inner)] for w in range(self.outer)]

    def attend(self, problem: Problem, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attend to one owner's K/V a step."""
        out, lse = self.buffers.state(q)
        self.kv[0][0].pack(k, v)
        for window, blocks in enumerate(self.blocks):
            far = pass_on(self.col, self.first, self.down, window)
            for step, block in enumerate(blocks):
                near = pass_on(self.row, self.kv[window], self.along[window], step)
                if block:
                    kv, progress = self.kv[window][step].arrays, partial(Testall, far + near)
                    self.kernel.forward(q, *kv, block=block, out=out, lse=lse, progress=progress)
                Waitall(near)
            Waitall(far)
        return out, lse

    def gradients(
        self, problem: Problem, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Add to one owner's dK/dV a step."""
        d_q = self.buffers.xp.zeros(q.shape, problem.wide)
        specs = [[problem.d_kv(owner) for owner in owners] for owners in self.owners]
        arriving = self.buffers.travelling([spec for window in specs for spec in window])
        [own] = self.buffers.parcels("own d_kv", specs[0][:1])
        self.home = self.buffers.parcels("home d_kv", arriving[:1] * 2)
        self.shares = self.buffers.parcels("arriving d_kv", arriving, buffers=1)
        self.d_kv = self.slots(self.buffers.sums, "d_kv", specs, far=self.inner - 1)
        self.d_kv[0][0] = own
        self.kv[0][0].pack(k, v)
        far: list[Request] = []
        returned: list[tuple[Parcel, Parcel]] = []
        for window, blocks in enumerate(self.blocks):
            far += pass_on(self.col, self.first, self.down, window)
            for step, block in enumerate(blocks):
                near, arrived = self.pass_sums(window, step) if step else ([], [])
                near += pass_on(self.row, self.kv[window], self.along[window], step)
                self.d_kv[window][step].fill(0, 0)
                if block:
                    kv, (d_k, d_v) = self.kv[window][step].arrays, self.d_kv[window][step].arrays
                    progress = partial(Testall, far + near)
                    self.kernel.backward(
                        q, *kv, block=block, d_out=d_out, lse=lse, delta=delta, d_q=d_q, d_k=d_k, d_v=d_v,
                        progress=progress,
                    )  # fmt: skip
                Waitall(near)
                add(arrived)
            Waitall(far)
            add(returned)
            far, returned = self.send_home(window, self.inner - 1)
        Waitall(far)
        add(returned)
        d_k, d_v = own.arrays
        return d_q, d_k, d_v

    def pass_sums(self, window: int, step: int) -> Posted:
        """Post the sums that follow K/V: the sum for this step's K/V arrives, the sum of the step before moves on."""
        source, dest = self.row.Shift(0, 1)
        ways, sums = self.along[window], self.d_kv[window]
        requests, arrived = self.send_home(window, step - 1)
        if ways[step].joined(step):
            share = self.shares[window * self.inner + step]
            requests.append(self.row.Irecv(share.message, source, Tag.D_KV))
            arrived.append((sums[step], share))
        if ways[step - 1].summed(step - 1) and not ways[step - 1].ends(step - 1):
            requests.append(self.row.Isend(sums[step - 1].message, dest, Tag.D_KV))
        return requests, arrived

    def send_home(self, window: int, step: int) -> Posted:
        """Post the sums that were complete at that step: one goes home, a share of this rank's own arrives."""
        requests, arrived = [], []
        if self.back[window].summed(step) and self.back[window].ends(step):
            source = self.grid.Get_cart_rank([self.r + window, self.c + step])
            share = self.home[window % 2]
            requests.append(self.grid.Irecv(share.message, source, Tag.D_KV))
            arrived.append((self.d_kv[0][0], share))
        if self.along[window][step].summed(step) and self.along[window][step].ends(step):
            dest = self.grid.Get_cart_rank([self.r - window, self.c - step])
            requests.append(self.grid.Isend(self.d_kv[window][step].message, dest, Tag.D_KV))
        return requests, arrived


def pass_on(ring: Cartesian, slots: Sequence[Parcel], ways: Sequence[Travel], step: int) -> list[Request]:
    """Post hop step + 1 of K/V round a row or a column: the next ones arrive, these travel on."""
    source, dest = ring.Shift(0, 1)
    hop, requests = step + 1, []
    if hop < len(slots) and ways[hop].reaches(hop):
        requests.append(ring.Irecv(slots[hop].message, source, Tag.KV))
    if ways[step].reaches(hop):
        requests.append(ring.Isend(slots[step].message, dest, Tag.KV))
    return requests


def add(arrived: Sequence[tuple[Parcel, Parcel]]) -> None:
    """Add the shares that have arrived to their sums."""
    for total, share in arrived:
        total.add(share)


def check(ranks: int, outer: int | None) -> tuple[int, int]:
    """Return rows and columns of the grid, or raise ValueError with those that fit."""
    return grid.check(ranks, outer, None)
