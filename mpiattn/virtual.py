"""The virtual cluster: the algorithms' own text on up to a thousand ranks of one process, in virtual time.

Each rank is a greenlet with a clock. It runs until it has to wait; the messages that it posts on its way
become events at the time on its clock, and the earliest event is always next, so that the outcome is the
same in every run. A message takes the ports of its two ranks (or their nodes' network cards) in the order
in which messages become ready, and as long as the machine description says; the port that is done last counts.

The namespace of arrays without data is this module: they have a shape and a dtype, and each function that
would touch memory moves the clock of the rank that calls it instead. Arrays with data work as well, and give
the same bits as under MPI; only messages and collectives then take virtual time.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from types import EllipsisType, ModuleType
from typing import Any, NamedTuple

import greenlet
import numpy as np
from numpy.typing import DTypeLike

from .machine import LEVELS, Machine, load
from .message import InputError, constant

Index = Any

_running: list[Rank] = []
"""The rank that runs now, last; empty outside of a virtual cluster."""


class Rank:
    """One virtual process: a clock in seconds, its ports, and what it holds of memory."""

    __slots__ = (
        "bandwidth",
        "clock",
        "cluster",
        "computed",
        "greenlet",
        "held",
        "latest",
        "missing",
        "number",
        "peak",
        "pending",
        "poll",
        "received",
        "waiting",
    )

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number
        self.bandwidth = cluster.machine.memory_bandwidth
        self.clock = self.latest = self.computed = self.waiting = 0.0
        self.missing = self.held = self.peak = self.received = 0
        self.poll = POLL
        self.pending: list[tuple[Request, tuple[int, int, int, int]]] = []
        self.greenlet: Any = None

    def compute(self, seconds: float) -> None:
        """Spend time at work."""
        self.clock += seconds
        self.computed += seconds

    def touch(self, nbytes: float) -> None:
        """Spend the time that memory takes to move so many bytes."""
        self.clock += nbytes / self.bandwidth

    def allocate(self, nbytes: int) -> None:
        """Count memory that this rank holds."""
        self.held += nbytes
        if self.held > self.peak:
            self.peak = self.held


def now() -> float | None:
    """Return the seconds on the clock of the rank that runs; None where none does."""
    return _running[-1].clock if _running else None


def current() -> Rank:
    """Return the rank whose text is running."""
    if not _running:
        raise RuntimeError("arrays without data live on a virtual cluster: call this from a function given to run()")
    return _running[-1]


# Arrays without data


class Storage:
    """Memory that a rank holds for as long as an array uses it."""

    __slots__ = ("nbytes", "rank")

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.rank = nbytes, current()
        self.rank.allocate(nbytes)

    def __del__(self) -> None:
        self.rank.held -= self.nbytes


class VirtualArray:
    """Shape and dtype of an array, and the storage it keeps alive."""

    __slots__ = ("dtype", "nbytes", "shape", "storage")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], storage: Storage) -> None:
        self.shape, self.dtype, self.storage = shape, dtype, storage
        self.nbytes = math.prod(shape) * dtype.itemsize

    def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
        return sys.modules[__name__]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> VirtualArray:
        shape, copied = _indexed(self.shape, index)
        if not copied:
            return VirtualArray(shape, self.dtype, self.storage)
        result = empty(shape, self.dtype)
        current().touch(2 * result.nbytes)
        return result

    def __setitem__(self, index: Index, value: Any) -> None:
        shape, _ = _indexed(self.shape, index)
        current().touch(2 * math.prod(shape) * self.dtype.itemsize)

    def view(self, dtype: DTypeLike) -> VirtualArray:
        """Return the same memory as another dtype, along the last axis."""
        kind = np.dtype(dtype)
        last = self.shape[-1] * self.dtype.itemsize // kind.itemsize
        return VirtualArray((*self.shape[:-1], last), kind, self.storage)

    def reshape(self, *shape: Any) -> VirtualArray:
        """Return the same memory in another shape."""
        lengths = tuple(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in lengths:
            rest = math.prod(length for length in lengths if length != -1)
            lengths = tuple(self.size // rest if length == -1 else length for length in lengths)
        if math.prod(lengths) != self.size:
            raise ValueError(f"cannot reshape {self.shape} into {lengths}")
        return VirtualArray(lengths, self.dtype, self.storage)

    def transpose(self, *axes: Any) -> VirtualArray:
        """Return the same memory with its axes in another order."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        return VirtualArray(
            tuple(self.shape[axis] for axis in order or range(self.ndim)[::-1]), self.dtype, self.storage
        )

    def astype(self, dtype: DTypeLike, copy: bool = True) -> VirtualArray:
        """Return a copy in another dtype."""
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        result = empty(self.shape, dtype)
        current().touch(self.nbytes + result.nbytes)
        return result

    def copy(self) -> VirtualArray:
        """Return a copy."""
        return self.astype(self.dtype)

    def fill(self, value: float) -> None:
        """Write every element."""
        self.storage.rank.touch(self.nbytes)

    def all(self) -> bool:
        """Say true: an array without data is in whatever state costs least to ask for."""
        return True

    def _update(self, other: Any) -> VirtualArray:
        self.storage.rank.touch(2 * self.nbytes + getattr(other, "nbytes", 0))
        return self

    __iadd__ = __isub__ = __imul__ = __itruediv__ = _update

    def _combine(self, other: Any) -> VirtualArray:
        result = empty(np.broadcast_shapes(self.shape, getattr(other, "shape", ())), self.dtype)
        current().touch(self.nbytes + getattr(other, "nbytes", 0) + result.nbytes)
        return result

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _combine

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Stand in for the few NumPy functions that the algorithms call on arrays."""
        own = getattr(sys.modules[__name__], function.__name__, None)
        return NotImplemented if own is None else own(*args, **kwargs)


def _indexed(shape: tuple[int, ...], index: Index) -> tuple[tuple[int, ...], bool]:
    """Return the shape of array[index], and whether it is a copy (an index array) and no view."""
    entries = index if isinstance(index, tuple) else (index,)
    given = sum(entry is not None and entry is not Ellipsis for entry in entries)
    result: list[int] = []
    axis, copied = 0, False
    for entry in entries:
        if entry is None:
            result.append(1)
        elif isinstance(entry, EllipsisType):
            skip = len(shape) - given
            result += shape[axis : axis + skip]
            axis += skip
        elif isinstance(entry, slice):
            result.append(len(range(*entry.indices(shape[axis]))))
            axis += 1
        elif isinstance(entry, (int, np.integer)):
            axis += 1
        else:
            result.append(int(np.count_nonzero(entry)) if np.asarray(entry).dtype == bool else len(entry))
            axis, copied = axis + 1, True
    return (*result, *shape[axis:]), copied


def empty(shape: Any, dtype: DTypeLike = float) -> VirtualArray:
    """Return an array of that shape and dtype."""
    kind = np.dtype(dtype)
    lengths = (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(map(int, shape))
    return VirtualArray(lengths, kind, Storage(math.prod(lengths) * kind.itemsize))


def full(shape: Any, value: float, dtype: DTypeLike = float) -> VirtualArray:
    """Return an array of that shape and dtype; writing it takes time."""
    result = empty(shape, dtype)
    result.fill(value)
    return result


def zeros(shape: Any, dtype: DTypeLike = float) -> VirtualArray:
    """Return an array of that shape and dtype; writing it takes time."""
    return full(shape, 0, dtype)


def ascontiguousarray(array: VirtualArray) -> VirtualArray:
    """Return the array."""
    return array


def isneginf(array: VirtualArray) -> VirtualArray:
    """Return an array of booleans."""
    return empty(array.shape, np.bool_)


def concatenate(arrays: Sequence[VirtualArray], axis: int = 0) -> VirtualArray:
    """Return the arrays one after the other."""
    shape = list(arrays[0].shape)
    shape[axis] = sum(array.shape[axis] for array in arrays)
    result = empty(shape, arrays[0].dtype)
    current().touch(2 * result.nbytes)
    return result


def einsum(subscripts: str, *operands: VirtualArray) -> VirtualArray:
    """Return an array of the shape that the subscripts say."""
    inputs, output = subscripts.split("->")
    lengths: dict[str, int] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        named = letters.replace("...", "")
        lengths.update(zip(named, operand.shape[operand.ndim - len(named) :], strict=True))
    letters, operand = inputs.split(",")[0], operands[0]
    batch = operand.shape[: operand.ndim - len(letters) + 3] if "..." in letters else ()
    result = empty((*batch, *(lengths[letter] for letter in output.replace("...", ""))), operand.dtype)
    current().touch(sum(array.nbytes for array in operands) + result.nbytes)
    return result


# Messages


class Request:
    """A message that a rank has posted, a send or a receive, or its part in a collective."""

    done = math.inf
    """When it is complete; inf while that isn't known."""
    arrived = math.inf
    """Of a send: when its last byte is there; inf while it is under way."""
    eager = False
    """Whether a send left before its receive was posted."""
    waited = False
    """Whether its rank waits for it."""
    other: Request | None = None
    """Of a send: the receive that takes it."""

    def __init__(self, rank: Rank, buffer: Any, nbytes: int, peer: int, sends: bool) -> None:
        self.rank, self.buffer, self.nbytes, self.peer, self.sends = rank, buffer, nbytes, peer, sends
        self.posted = rank.clock

    @staticmethod
    def Waitall(requests: Sequence[Request]) -> None:
        """Wait until every request is complete."""
        requests[0].rank.cluster.wait(requests[0].rank, requests)

    @staticmethod
    def Testall(requests: Sequence[Request]) -> bool:
        """Let messages travel up to now, and say if all requests are complete."""
        rank = requests[0].rank
        rank.clock += rank.poll
        rank.cluster.pause(rank)
        done = all(request.done <= rank.clock for request in requests)
        rank.poll = POLL if done else min(2 * rank.poll, LONGEST_POLL)
        return done

    def Wait(self) -> None:
        """Wait until this request is complete."""
        self.Waitall([self])

    def Test(self) -> bool:
        """Say if this request is complete."""
        return self.Testall([self])

    def complete(self, time: float) -> None:
        """Set when it is complete; the rank that waits for it, and for nothing else, goes on then."""
        self.done = time
        if self.waited:
            rank = self.rank
            self.waited = False
            rank.missing -= 1
            if time > rank.latest:
                rank.latest = time
            if not rank.missing:
                cluster = rank.cluster
                heapq.heappush(cluster.events, (rank.latest, next(cluster.order), rank))


POLL, LONGEST_POLL = 1e-7, 1e-3
"""Seconds that the first look at the state of messages takes; each one in vain doubles it, so that polling ends."""

INSIDE = LEVELS[:2]
"""The levels of links inside a node."""

NOBODY = -1
"""The rank beyond the edge of a grid that does not wrap around: messages to it and from it are done at once."""

Port = list[float]
"""When a port is free again, one number in a list."""


class Cluster:
    """Virtual ranks, their events in the order of time, and the ports between them.

    Parameters
    ----------
    ranks : int
    machine : Machine
    limit : float
        Seconds after which a run ends with TimeoutError.
    """

    def __init__(self, ranks: int, machine: Machine, limit: float = math.inf) -> None:
        if ranks < 1:
            raise ValueError(f"a cluster has at least one rank, not {ranks}")
        self.machine, self.limit = machine, limit
        self.overhead, self.eager, self.progress = machine.overhead, machine.eager, machine.progress
        self.ranks = [Rank(self, number) for number in range(ranks)]
        self.events: list[tuple[float, int, Rank | Request]] = []
        self.order = itertools.count()
        self.mail: dict[tuple[int, int, int, int], Request | deque[Request]] = {}
        self.groups: dict[Any, Group] = {}
        self.ports: dict[Any, Port] = {}
        self.routes: dict[tuple[int, int], Route] = {}
        self.failed: BaseException | None = None
        self.hub: Any = None

    def run(self, function: Callable[[VirtualComm], Any]) -> list[Any]:
        """Call a function with each rank's communicator, and return what each returned.

        Raises
        ------
        Whatever a rank raises first; RuntimeError where ranks wait for messages that nobody sends.
        """
        world = self.group(("world", len(self.groups)), range(len(self.ranks)))
        results: list[Any] = [None] * len(self.ranks)

        def start(rank: Rank) -> None:
            try:
                results[rank.number] = function(VirtualComm(world, rank))
            except greenlet.GreenletExit:
                pass  # another rank has failed
            except BaseException as error:  # whoever called run gets it
                self.failed = error

        self.hub, self.failed = greenlet.getcurrent(), None
        for rank in self.ranks:
            rank.greenlet = greenlet.greenlet(functools.partial(start, rank))
            self.schedule(rank.clock, rank)
        _running.append(self.ranks[0])
        try:
            self._loop()
        finally:
            _running.pop()
            self.events.clear()
        return results

    def _loop(self) -> None:
        """Take the earliest event, until none is left."""
        events, pop = self.events, heapq.heappop
        while events and self.failed is None:
            time, _, event = pop(events)
            if time > self.limit:
                self.failed = TimeoutError(f"not done after {self.limit:g} s")
                break
            if type(event) is Rank:
                event.clock = time
                _running[-1] = event
                event.greenlet.switch()
            else:
                self._transfer(time, event)  # type: ignore[arg-type]
        stuck = [rank for rank in self.ranks if not rank.greenlet.dead]
        reasons = [self._stuck(rank) for rank in stuck[:4]] if self.failed is None else []
        for rank in stuck:
            _running[-1] = rank
            rank.greenlet.throw(greenlet.GreenletExit)
        if self.failed is not None:
            raise self.failed
        if reasons:
            raise RuntimeError(f"{len(stuck)} ranks wait for ever: " + "; ".join(reasons))
        if self.mail:
            _, source, dest, tag = next(iter(self.mail))
            raise RuntimeError(f"a message from rank {source} to rank {dest} with tag {tag} has no partner")

    def _stuck(self, rank: Rank) -> str:
        mine = [
            key
            for key, waiting in self.mail.items()
            for request in (waiting if isinstance(waiting, deque) else [waiting])
            if request.rank is rank
        ]
        told = [f"{s} -> {d} tag {t}" for _, s, d, t in mine[:2]] or ["a collective that not all have called"]
        return f"rank {rank.number} for {' and '.join(told)}"

    def schedule(self, time: float, event: Rank | Request) -> None:
        """Put an event in its place; events at the same time keep the order in which they were posted."""
        heapq.heappush(self.events, (time, next(self.order), event))

    def pause(self, rank: Rank) -> None:
        """Let everything happen that comes before this rank's clock."""
        self._activate(rank)
        self.schedule(rank.clock, rank)
        self.hub.switch()

    def wait(self, rank: Rank, requests: Sequence[Request]) -> None:
        """Move a rank's clock to where all requests are complete."""
        if rank.pending:
            self._activate(rank)
        start = latest = rank.clock
        missing, unknown = 0, math.inf
        for request in requests:
            if request.done == unknown:
                request.waited = True
                missing += 1
            elif request.done > latest:
                latest = request.done
        rank.poll = POLL
        if missing:
            rank.missing, rank.latest = missing, latest
            self.hub.switch()
        else:
            rank.clock = latest
        rank.waiting += rank.clock - start

    # From post to completion

    def _activate(self, rank: Rank) -> None:
        """Hand the messages to an MPI library that works only while it is called."""
        if rank.pending:
            for request, key in rank.pending:
                request.posted = rank.clock
                self.match(request, key)
            rank.pending.clear()

    def match(self, request: Request, key: tuple[int, int, int, int]) -> None:
        """Bring a send and its receive together; the message is ready when both are posted."""
        if request.sends and request.nbytes < self.eager:
            request.eager = True
            request.buffer = request.buffer.copy()
            request.complete(request.posted)
            self.schedule(request.posted, request)
        other = self.mail.pop(key, None)
        if other is None:
            self.mail[key] = request
            return
        if type(other) is not Request or other.sends == request.sends:
            other = self._in_order(request, other, key)
            if other is None:
                return
        send, receive = (request, other) if request.sends else (other, request)
        send.other = receive
        if not send.eager:
            ready = send.posted if send.posted > receive.posted else receive.posted
            if not self.events or ready <= self.events[0][0]:
                self._transfer(ready, send)  # nothing comes before it
            else:
                heapq.heappush(self.events, (ready, next(self.order), send))
        elif send.arrived < math.inf:
            self._deliver(send, receive)

    def _in_order(
        self, request: Request, waiting: Request | deque[Request], key: tuple[int, int, int, int]
    ) -> Request | None:
        """Return the partner of a request, or keep it, where several messages of one tag are under way."""
        queue = waiting if isinstance(waiting, deque) else deque([waiting])
        other = None
        if queue[0].sends == request.sends:
            queue.append(request)
        else:
            other = queue.popleft()
        if queue:
            self.mail[key] = queue
        return other

    def _transfer(self, ready: float, send: Request) -> None:
        """Take the ports on a message's way, for as long as it takes."""
        pair = send.rank.number, send.peer
        route = self.routes.get(pair)
        if route is None:
            route = self.routes[pair] = self._route(*pair)
        latency, per_byte, out, into, others = route
        # Each port serves the messages as they become ready; one that is held up elsewhere holds up no other.
        taken = send.nbytes * per_byte
        end = out[0] = (out[0] if out[0] > ready else ready) + taken
        into[0] = (into[0] if into[0] > ready else ready) + taken
        if into[0] > end:
            end = into[0]
        for port, share in others:
            port[0] = max(port[0], ready) + send.nbytes * share
            end = max(end, port[0])
        send.arrived = end + latency
        if send.other is not None:
            self._deliver(send, send.other)
        if not send.eager:
            send.complete(end)

    def _deliver(self, send: Request, receive: Request) -> None:
        if receive.nbytes < send.nbytes:
            raise ValueError(
                f"rank {receive.rank.number} receives {receive.nbytes} bytes from rank {send.rank.number}, "
                f"which sends {send.nbytes}"
            )
        if type(send.buffer) is not VirtualArray:
            _copy(send.buffer, receive.buffer)
        receive.rank.received += send.nbytes
        receive.complete(send.arrived if send.arrived > receive.posted else receive.posted)

    def _route(self, source: int, dest: int) -> Route:
        """Return the way of messages from one rank to another."""
        machine = self.machine
        level = machine.level(source, dest)
        link = machine.links[level]
        per_byte = 1 / link.bandwidth
        own: list[Port] = []
        others: list[tuple[Port, float]] = []
        for rank, way in ((source, "out"), (dest, "in")):
            node, local = divmod(rank, machine.ranks_per_node)
            way = way if machine.duplex else "both"
            if link.cards:
                own.append(self._port("card", way, node, local * link.cards // machine.ranks_per_node))
            else:
                own.append(self._port(level in INSIDE, way, rank))
            if math.isfinite(link.shared) and (rank == source or level not in INSIDE):
                others.append((self._port("shared", level, way, node), 1 / link.shared))
        return Route(link.latency, per_byte, own[0], own[1], others)

    def _port(self, *key: object) -> Port:
        return self.ports.setdefault(key, [0.0])

    def group(self, key: object, ranks: Sequence[int]) -> Group:
        """Return the group of that key; all its members ask for the same one."""
        if key not in self.groups:
            self.groups[key] = Group(len(self.groups), tuple(ranks))
        return self.groups[key]

    @property
    def time(self) -> float:
        """Seconds until the last rank was done."""
        return max(rank.clock for rank in self.ranks)


class Route(NamedTuple):
    """Latency, seconds per byte, the two ends, and what else is on the way with the seconds per byte it takes."""

    latency: float
    per_byte: float
    out: Port
    into: Port
    others: list[tuple[Port, float]]


def _copy(source: Any, target: Any) -> None:
    """Move the bytes of a message, if it has any."""
    if isinstance(source, np.ndarray):
        data = source.reshape(-1).view(np.uint8)
        target.reshape(-1).view(np.uint8)[: len(data)] = data


# Communicators


class Group:
    """What the communicators of several ranks share: who they are, and where they meet."""

    def __init__(self, number: int, ranks: tuple[int, ...]) -> None:
        self.number, self.ranks = number, ranks
        self.place = {rank: place for place, rank in enumerate(ranks)}
        self.meetings: dict[int, Meeting] = {}


class Meeting:
    """One collective call: what each rank brought, and what comes of it."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.values: list[Any] = [None] * size
        self.requests: list[Request] = []
        self.result: Any = None


class VirtualComm:
    """A communicator of virtual ranks, with mpi4py's methods.

    Made by `Cluster.run` and by its own methods. Collectives take the time of the usual algorithms: binomial
    trees for latency, rings or pairwise exchange for bytes (Thakur, Rabenseifner and Gropp 2005), over the
    slowest link of the group, on which all ranks of a node are taken to be busy at once.
    """

    def __init__(self, group: Group, rank: Rank, dims: Sequence[int] = (), periods: Sequence[bool] = ()) -> None:
        self.group, self.me, self.dims, self.periods = group, rank, list(dims), list(periods)
        self.place = group.place[rank.number]
        self.calls = self.children = 0

    # Topology

    def Get_size(self) -> int:
        """Return the number of ranks."""
        return len(self.group.ranks)

    def Get_rank(self) -> int:
        """Return this rank."""
        return self.place

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.group.ranks)

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self.place

    def _child(self, color: object, ranks: Sequence[int], **cart: Any) -> VirtualComm:
        """Return the next communicator made from this one, shared by the ranks of one color."""
        self.children += 1
        group = self.me.cluster.group((self.group.number, self.children, color), ranks)
        return VirtualComm(group, self.me, **cart)

    def Dup(self) -> VirtualComm:
        """Return a communicator of the same ranks."""
        return self._child("dup", self.group.ranks, dims=self.dims, periods=self.periods)

    def Create_cart(self, dims: Sequence[int], periods: Sequence[bool], reorder: bool = False) -> VirtualComm:
        """Make a Cartesian communicator of all ranks; they keep their order."""
        if math.prod(dims) != self.Get_size():
            raise ValueError(f"a grid of {list(dims)} does not hold {self.Get_size()} ranks")
        return self._child("cart", self.group.ranks, dims=dims, periods=periods)

    def Sub(self, remain_dims: Sequence[bool]) -> VirtualComm:
        """Make the communicator of a row or a column of a grid."""
        coords = self.Get_coords(self.place)
        numbers = np.array(self.group.ranks).reshape(self.dims)
        where = tuple(slice(None) if remain else coord for remain, coord in zip(remain_dims, coords, strict=True))
        kept = [axis for axis, remain in enumerate(remain_dims) if remain]
        color = tuple(coord for coord, remain in zip(coords, remain_dims, strict=True) if not remain)
        cart = {"dims": [self.dims[axis] for axis in kept], "periods": [self.periods[axis] for axis in kept]}
        return self._child(color, numbers[where].reshape(-1).tolist(), **cart)

    def Get_coords(self, rank: int) -> list[int]:
        """Return a rank's coordinates in a grid."""
        return [int(coord) for coord in np.unravel_index(rank, self.dims)]

    def Get_cart_rank(self, coords: Sequence[int]) -> int:
        """Return the rank at coordinates of a grid, which wrap around."""
        return int(np.ravel_multi_index(tuple(coords), self.dims, mode="wrap"))

    def Shift(self, direction: int, disp: int) -> tuple[int, int]:
        """Return (source, dest) along a dimension of a grid."""
        coords, size = self.Get_coords(self.place), self.dims[direction]
        found = []
        for step in (-disp, disp):
            coord = coords[direction] + step
            inside = self.periods[direction] or 0 <= coord < size
            moved = [*coords[:direction], coord % size, *coords[direction + 1 :]]
            found.append(self.Get_cart_rank(moved) if inside else NOBODY)
        return found[0], found[1]

    def Split(self, color: int = 0, key: int = 0) -> VirtualComm:
        """Make a communicator of the ranks of the same color, in the order of their keys."""
        brought = self.allgather((color, key))
        members = sorted((theirs, place) for place, (other, theirs) in enumerate(brought) if other == color)
        return self._child(color, [self.group.ranks[place] for _, place in members])

    def Split_type(self, split_type: int = 0, key: int = 0) -> VirtualComm:
        """Make a communicator of the ranks of this rank's node."""
        return self.Split(self.me.number // self.me.cluster.machine.ranks_per_node, key)

    def Free(self) -> None:
        """Do nothing: a virtual communicator holds nothing."""

    # Messages

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        """Start to send a buffer."""
        return self._post(buf, dest, (self.group.number, self.place, dest, int(tag)), True)

    def Irecv(self, buf: Any, source: int, tag: int = 0) -> Request:
        """Start to receive into a buffer."""
        return self._post(buf, source, (self.group.number, source, self.place, int(tag)), False)

    def _post(self, buf: Any, peer: int, key: tuple[int, int, int, int], sends: bool) -> Request:
        buffer = buf[0] if type(buf) is list else buf
        rank = self.me
        cluster = rank.cluster
        rank.clock += cluster.overhead
        if peer < 0:
            request = Request(rank, buffer, 0, peer, sends)
            request.done = rank.clock
            return request
        request = Request(rank, buffer, buffer.nbytes, self.group.ranks[peer], sends)
        if cluster.progress:
            cluster.match(request, key)
        else:
            rank.pending.append((request, key))
        return request

    # Collectives

    def _meet(self, name: str, value: Any, finish: Callable[[Meeting], float]) -> tuple[Request, Meeting]:
        """Bring a value to a collective call; the last rank to come finishes it and says how long it takes."""
        self.calls += 1
        meeting = self.group.meetings.setdefault(self.calls, Meeting(name, self.Get_size()))
        if meeting.name != name:
            raise RuntimeError(f"rank {self.place} calls {name}, where others have called {meeting.name}")
        request = Request(self.me, None, 0, self.me.number, False)
        meeting.values[self.place] = value
        meeting.requests.append(request)
        if len(meeting.requests) == self.Get_size():
            del self.group.meetings[self.calls]
            done = max(other.posted for other in meeting.requests) + finish(meeting)
            for other in meeting.requests:
                other.complete(done)
        return request, meeting

    def _seconds(self, rounds: float, nbytes: float, pairwise: bool = False) -> float:
        """Return the time of a collective: so many messages one after the other, so many bytes into a rank.

        Round a ring, one rank of a node at a time receives from another node. Pairwise, all do at once.
        """
        machine, ranks = self.me.cluster.machine, self.group.ranks
        if len(ranks) == 1:
            return 0.0
        levels = [machine.level(ranks[0], other) for other in ranks[1:]]
        slowest = max(set(levels), key=LEVELS.index)
        link, seconds = machine.links[slowest], 0.0
        for level in set(levels) if pairwise else {slowest}:
            part = nbytes * levels.count(level) / len(levels) if pairwise else nbytes
            cards = machine.links[level].cards
            share = min(cards / machine.ranks_per_node, 1.0) if pairwise and cards else 1.0
            seconds = max(seconds, part / (machine.links[level].bandwidth * share))
        return rounds * (link.latency + machine.overhead) + seconds

    @property
    def _depth(self) -> int:
        return (self.Get_size() - 1).bit_length()

    def Barrier(self) -> None:
        """Wait for all ranks."""
        self._meet("Barrier", None, lambda meeting: self._seconds(self._depth, 0))[0].Wait()

    def allgather(self, value: Any) -> list[Any]:
        """Give every rank the objects of all."""
        request, meeting = self._meet("allgather", value, lambda meeting: self._seconds(self._depth, 0))
        request.Wait()
        return list(meeting.values)

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        """Give the root the objects of all."""
        values = self.allgather(value)
        return values if self.place == root else None

    def allreduce(self, value: Any, op: Any = "SUM") -> Any:
        """Give every rank the sum, or the maximum, of the objects of all."""
        return _combined(self.allgather(value), op)

    def bcast(self, value: Any, root: int = 0) -> Any:
        """Give every rank the root's object."""
        request, meeting = self._meet("bcast", value, lambda meeting: self._seconds(self._depth, 0))
        request.Wait()
        return meeting.values[root]

    def Bcast(self, buf: Any, root: int = 0) -> None:
        """Copy the root's buffer to every rank."""

        def finish(meeting: Meeting) -> float:
            for other in meeting.values:
                if other is not meeting.values[root]:
                    _copy(meeting.values[root], other)
            return self._seconds(self._depth, 2 * buf.nbytes)

        self._meet("Bcast", buf, finish)[0].Wait()

    def Allgather(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give every rank the buffers of all, one after the other."""

        def finish(meeting: Meeting) -> float:
            if isinstance(sendbuf, np.ndarray):
                meeting.result = np.concatenate([np.ravel(value) for value in meeting.values])
            return self._seconds(self._depth, (self.Get_size() - 1) * sendbuf.nbytes)

        request, meeting = self._meet("Allgather", sendbuf, finish)
        request.Wait()
        _copy(meeting.result, recvbuf)

    def Allgatherv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give every rank the pieces of all; recvbuf is `message.Pieces`."""
        self.Iallgatherv(sendbuf, recvbuf).Wait()

    def Iallgatherv(self, sendbuf: Any, recvbuf: Any) -> Request:
        """Start to give every rank the pieces of all."""

        def finish(meeting: Meeting) -> float:
            for source, (sent, kept) in enumerate(meeting.values):
                buffer, pieces = kept
                own = buffer[pieces[source]] if not hasattr(sent, "shape") else sent
                for place, (_, (target, where)) in enumerate(meeting.values):
                    if place != source or own is sent:
                        _copy(own, target[where[source]])
            return self._seconds(self._depth, self._receive(meeting))

        return self._meet("Allgatherv", (sendbuf, _pieces(recvbuf)), finish)[0]

    def Alltoallv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give each rank its piece of every other's; both are `message.Pieces`."""

        def finish(meeting: Meeting) -> float:
            for dest, (_, (target, where)) in enumerate(meeting.values):
                for source, ((buffer, pieces), _) in enumerate(meeting.values):
                    _copy(buffer[pieces[dest]], target[where[source]])
            return self._seconds(self._depth, self._receive(meeting), pairwise=True)

        self._meet("Alltoallv", (_pieces(sendbuf), _pieces(recvbuf)), finish)[0].Wait()

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Any = "SUM") -> None:
        """Combine the buffers of all, in the order of the ranks."""

        def finish(meeting: Meeting) -> float:
            total = _combined([sent for sent, _ in meeting.values], op)
            for _, target in meeting.values:
                _copy(total, target)
            return self._seconds(2 * self._depth, 2 * recvbuf.nbytes * (1 - 1 / self.Get_size()))

        self._meet("Allreduce", (sendbuf, recvbuf), finish)[0].Wait()

    def Ireduce_scatter(self, sendbuf: Any, recvbuf: Any, recvcounts: Sequence[int]) -> Request:
        """Start to add up the buffers of all, in the order of the ranks, and give each rank its piece."""

        def finish(meeting: Meeting) -> float:
            total = _combined([sent for sent, _ in meeting.values], "SUM")
            ends = np.cumsum([0, *recvcounts])
            for place, (_, target) in enumerate(meeting.values):
                _copy(total[ends[place] : ends[place + 1]], target)
            for place, number in enumerate(self.group.ranks):  # its piece from each of the others
                nbytes = recvcounts[place] * recvbuf.dtype.itemsize
                self.me.cluster.ranks[number].received += nbytes * (self.Get_size() - 1)
            return self._seconds(self._depth, sendbuf.nbytes * (1 - 1 / self.Get_size()))

        return self._meet("Reduce_scatter", (sendbuf, recvbuf), finish)[0]

    def _receive(self, meeting: Meeting) -> int:
        """Count the pieces that each rank receives from others; return the bytes of the one with the most."""
        most = 0
        for place, (number, (_, (_, pieces))) in enumerate(zip(self.group.ranks, meeting.values, strict=True)):
            nbytes = sum(piece.stop - piece.start for source, piece in enumerate(pieces) if source != place)
            self.me.cluster.ranks[number].received += nbytes
            most = max(most, nbytes)
        return most

    def Ibarrier(self) -> Request:
        """Start to wait for all ranks."""
        return self._meet("Barrier", None, lambda meeting: self._seconds(self._depth, 0))[0]

    def Allocate_shared(self, nbytes: int) -> VirtualWindow:
        """Make a window of memory that all ranks see."""
        request, meeting = self._meet("Allocate_shared", np.empty(nbytes, np.uint8), lambda meeting: 0.0)
        request.Wait()
        return VirtualWindow(self, meeting.values)


class VirtualWindow:
    """Memory that the ranks of a virtual host share."""

    def __init__(self, comm: VirtualComm, parts: list[Any]) -> None:
        self.comm, self.parts = comm, parts

    def Shared_query(self, rank: int) -> tuple[Any, int]:
        """Return a rank's part, and the size of its unit."""
        return self.parts[rank], 1

    def Fence(self) -> None:
        """Wait until all ranks see what all have written."""
        self.comm.Barrier()

    def Free(self) -> None:
        """Do nothing."""


def _pieces(described: Sequence[Any]) -> tuple[Any, list[slice]]:
    """Return the buffer of `message.Pieces` as bytes, and where each rank's piece lies."""
    buffer, counts, starts, datatype = described
    unit = datatype.Get_size() if datatype else buffer.dtype.itemsize
    if starts is None:
        starts = [sum(counts[:place]) for place in range(len(counts))]
    slices = [slice(start * unit, (start + count) * unit) for start, count in zip(starts, counts, strict=True)]
    return buffer.reshape(-1).view(np.uint8), slices


def _combined(buffers: Sequence[Any], op: Any) -> Any:
    """Return the sum, or the maximum, of the ranks' buffers."""
    if isinstance(buffers[0], VirtualArray):
        return buffers[0]
    if op == constant("MAX"):
        return functools.reduce(np.maximum, buffers)
    if op not in ("SUM", constant("SUM")):
        raise ValueError(f"a virtual communicator adds and takes maxima; it knows no {op}")
    return functools.reduce(np.add, buffers)


def run(ranks: int, machine: Machine, function: Callable[[VirtualComm], Any]) -> list[Any]:
    """Call a function with the communicator of each rank of a new cluster, and return what each returned."""
    return Cluster(ranks, machine).run(function)


def command(main: Callable[[Any, VirtualComm], int], args: Any) -> int:
    """Run a subcommand on `args.virtual` ranks of one host of the machine `args.machine`; return the exit status."""
    if args.virtual < 1:
        raise InputError(f"--virtual takes 1 rank or more, not {args.virtual}")
    one_host = dataclasses.replace(load(args.machine), ranks_per_node=args.virtual)
    return int(max(run(args.virtual, one_host, lambda comm: main(args, comm))))
