"""An implementation of attention that is judged, whoever wrote it: how it is called, and how it says no."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..costs.traffic import Costs, Traffic
from ..errors import InputError
from ..messages.message import Communicator
from ..trace.comm import TracedComm
from ..trace.events import Trace
from ..trace.mpi_calls import COLLECTIVES
from .case import Case

Factory = Callable[..., Any]


class Refused(Exception):
    """An implementation says that a case is beyond it; its arguments are the case and the reason."""

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


@dataclass(frozen=True)
class Player:
    """An implementation, and what is asked of it.

    Attributes
    ----------
    factory : function or class
        Called with a communicator and `Case.options`.
    traffic : function, optional
        Called with the problem and the rank, returns what the rank should receive.
    foreign : bool
        Whether it is not this package's: then all that it sends is traffic, also what could be the agreement of the
        ranks on their input; it may refuse any case; what it raises is a failure of a case, and not of the run.
    communicator : bool
        Whether the factory is given a communicator, over which messages are counted.
    backward : bool
        Whether the backward pass is judged as well.
    patience : float
        Seconds that the other ranks have where a foreign implementation has raised on one.
    """

    factory: Factory
    traffic: Callable[..., Costs] | None = None
    foreign: bool = False
    communicator: bool = True
    backward: bool = True
    patience: float = 20.0

    @contextlib.contextmanager
    def refusing(self, case: Case) -> Iterator[None]:
        """Raise Refused where the implementation says that it can't do the case.

        That is NotImplementedError or InputError of any case, by a foreign implementation; and of a feature that not
        all have, also another ValueError, or the TypeError of an unknown argument.
        """
        try:
            yield
        except (TypeError, ValueError, NotImplementedError) as error:
            if case.optional or (self.foreign and isinstance(error, (NotImplementedError, InputError))):
                raise Refused(case, str(error) or type(error).__name__) from error
            raise


@dataclass
class Received:
    """Messages and bytes that one rank received.

    Attributes
    ----------
    passes : dict
        By "forward", "backward" and "sink_gradient".
    uncounted : Counter
        Calls, by name, of which nothing is known but that they were made.
    unchecked : set of str
        Results that the implementation does not give.
    """

    passes: dict[str, Traffic] = field(default_factory=dict)
    uncounted: Counter[str] = field(default_factory=Counter)
    unchecked: set[str] = field(default_factory=set)


class Count:
    """The traffic of a player's passes on one rank."""

    def __init__(self, comm: Communicator, foreign: bool) -> None:
        self.comm, self.foreign = comm, foreign
        self.traced = TracedComm(comm, Trace(agreements=not foreign))
        self.seen: dict[str, Trace] = {}
        self.uncounted: Counter[str] = Counter()

    def take(self, name: str) -> None:
        """Keep what was recorded since the last call as that of a pass."""
        trace = self.traced.trace
        self.seen[name] = Trace(list(trace.events), uncounted=Counter(trace.uncounted))
        trace.clear()

    def received(self) -> Received:
        """Return what this rank received in each pass; all ranks call it together.

        Messages of a foreign implementation are counted by their senders: its receives may have room for more.
        """
        uncounted: Counter[str] = sum((trace.uncounted for trace in self.seen.values()), Counter())
        if not self.foreign:
            return Received({name: Traffic(*trace.received()) for name, trace in self.seen.items()}, uncounted)
        size, rank, passes = self.comm.Get_size(), self.comm.Get_rank(), {}
        for name, trace in self.seen.items():
            sent = np.zeros((size, 2), np.int64)  # messages and bytes, by receiver
            for event in trace.events:
                if event.kind == "send" and event.peer != rank:
                    sent[event.peer] += 1, event.nbytes
            messages, nbytes = np.array(self.comm.allgather(sent))[:, rank].sum(axis=0).tolist()
            pieces = [e.nbytes for e in trace.events if e.kind == "receive" and e.name in COLLECTIVES]
            passes[name] = Traffic(messages + len(pieces), nbytes + sum(pieces))
        return Received(passes, uncounted)
