"""State of a rank, as its records tell it."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

from .record import Kind, Record, State, Steps

KEPT = 4000  # records of a rank that its timeline shows


@dataclass
class Wait:
    """A message or a collective that a rank waits for.

    Attributes
    ----------
    kind : {"send", "receive", "collective"}
    name : str
        KV, D_Q, Allgather, ...
    comm : str
        Key of the communicator.
    peer : int
        The other rank; -1 of a collective.
    number : int
        How many of this name went to or came from this rank over the communicator, this one included; of
        collectives, how many there were on the communicator.
    nbytes : int
    """

    kind: str
    name: str
    comm: str
    peer: int
    number: int
    nbytes: int

    @property
    def over(self) -> str:
        """How the communicator was made."""
        return self.comm.partition("#")[0]


@dataclass
class Doing:
    """State of a rank: its passes, its waits, its last steps.

    Attributes
    ----------
    status : {"running", "stopped", "gone", "left", "raised", "unknown"}
        Of its process. Gone: without having left the watch. Unknown: its host does not answer.
    quiet : float
        Seconds since its last record.
    well, ill : float
        Between these times it ended, or raised an exception; as `time.monotonic` of the host that has this.
    passes : list of str
        It is in, the outermost one first.
    step : int
        Number of its wait, in the outermost pass.
    waits : list of Wait
        What it waits for; where it waits for nothing, what it has posted and not waited for.
    waiting : bool
    posted : dict
        Last number of each kind, communicator, peer and name, joined by blanks.
    called : dict
        Last number and name of a collective, by communicator.
    comms : dict
        Ranks of each communicator, of the watched one, and how it was made.
    """

    rank: int
    host: str
    pid: int
    status: str = "unknown"
    quiet: float = 0.0
    well: float = -math.inf
    ill: float = math.inf
    error: str = ""
    stack: str = ""
    passes: list[str] = field(default_factory=list)
    step: int = 0
    waiting: bool = False
    waits: list[Wait] = field(default_factory=list)
    posted: dict[str, int] = field(default_factory=dict)
    called: dict[str, tuple[int, str]] = field(default_factory=dict)
    comms: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return asdict(self)

    @classmethod
    def of_json(cls, given: dict[str, Any]) -> Doing:
        """Return what `to_json` was given."""
        doing = cls(**given)
        doing.waits = [Wait(**wait) for wait in given["waits"]]
        doing.records = [Record(*record) for record in given["records"]]
        doing.names = {int(number): name for number, name in given["names"].items()}
        return doing


KINDS = {Kind.SEND: "send", Kind.RECEIVE: "receive", Kind.START: "collective", Kind.CALL: "collective"}


def posted_key(kind: str, comm: str, peer: int, name: str) -> str:
    """Return under which key the last number of such a message stands."""
    return f"{kind} {comm} {peer} {name}"


def read(steps: Steps, doing: Doing, now: float) -> Doing:
    """Add what the records of a rank say, at a time of its host."""
    names, keys = {}, {}
    for line in steps.text():
        if "name" in line:
            names[line["number"]] = line["name"]
        elif "comm" in line:
            key = f"{line['comm']}#{zlib.crc32(repr(line['ranks']).encode()):08x}"
            keys[line["number"]] = key
            doing.comms[key] = line["comm"], tuple(line["ranks"])
        else:
            doing.error = line["error"]
    records = list(steps.records())
    open_posts: dict[int, Record] = {}
    awaited: list[int] = []
    call: Record | None = None
    for record in records:
        if record.kind in KINDS:
            key, kind, name = keys.get(record.comm, "?"), KINDS[record.kind], names.get(record.name, "?")
            if kind == "collective":
                doing.called[key] = record.number, name
            else:
                doing.posted[posted_key(kind, key, record.peer, name)] = record.number
        if record.kind == Kind.CALL:
            call, doing.step = record, record.post
        elif record.kind in KINDS:
            open_posts[record.post] = record
        elif record.kind == Kind.WAIT:
            awaited += [record.post + bit for bit in range(64) if record.nbytes >> bit & 1]
            doing.step = record.peer
        elif record.kind == Kind.DONE:
            for post in awaited:
                open_posts.pop(post, None)
            awaited, call = [], None
        elif record.kind == Kind.PASS:
            doing.passes.append(names.get(record.name, "?"))
        elif record.kind == Kind.END and doing.passes:
            doing.passes.pop()
    doing.waiting = bool(awaited or call)
    waited_for = [call] if call else [open_posts[post] for post in awaited if post in open_posts]
    for record in waited_for or open_posts.values():
        key, kind, name = keys.get(record.comm, "?"), KINDS[record.kind], names.get(record.name, "?")
        doing.waits.append(Wait(kind, name, key, record.peer, record.number, record.nbytes))
    doing.quiet = now - records[-1].time if records else 0.0
    doing.names, doing.records = names, records[-KEPT:]
    if steps.state != State.WATCHED:
        doing.status = steps.state.name.lower()
    return doing
