"""The last steps of a rank, in a file that outlives it.

A rank writes a record of 32 bytes for each message that it posts, each wait and each pass, into a ring in memory
that is mapped from a file. What it wrote can be read by another process, also when the rank is stopped, stuck or
dead, and without a word from it. A record takes the rank about half a microsecond.

    head     magic, number of records so far, state, bytes of text
    text     lines of JSON: names of messages and passes, ranks of communicators, an exception
    ring     the last `CAPACITY` records
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"mpiattn1"
HEAD, TEXT, CAPACITY = 64, 2**16, 2**13
RECORD = struct.Struct("<dBBHiIIQ")
SIZE = HEAD + TEXT + CAPACITY * RECORD.size
RING, WIDTH, pack, monotonic = HEAD + TEXT, RECORD.size, RECORD.pack_into, time.monotonic
NAMES, COMMS = 2**8, 2**16
"""How many names and communicators a record can tell apart; the last one of each stands for all others."""


class Kind:
    """Kind of a record: plain numbers, as a rank has to be quick."""

    SEND = 1  # posted
    RECEIVE = 2  # posted
    START = 3  # a collective that does not block
    WAIT = 4  # begins, for posts
    DONE = 5  # a wait or a collective ends
    CALL = 6  # a collective begins
    PASS = 7  # begins
    END = 8  # of a pass


class State(IntEnum):
    """How a rank stands to the watch."""

    WATCHED = 0
    LEFT = 1  # came to the end of the block
    RAISED = 2  # left it by an exception
    TOLD = 3  # ends by a signal that it heeds


class Record(NamedTuple):
    """Act of a rank at a time, in seconds of its host's `time.monotonic`.

    Attributes
    ----------
    name : int
        Of the message, the collective or the pass, in the text.
    comm : int
        Number of the communicator in the text.
    peer : int
        The other rank, of the watched communicator, -1 where there is none; of a wait the step: its number in the pass.
    number : int
        How many of this kind, name, communicator and peer there were, this one included; of collectives, how many
        on the communicator.
    post : int
        Number of a post of this rank; of a wait that of the first post it waits for.
    nbytes : int
        Of a wait the posts, as bits: the first one is bit 0.
    """

    time: float
    kind: int
    name: int
    comm: int
    peer: int
    number: int
    post: int
    nbytes: int


class Recorder:
    """Writes the records of this rank.

    Parameters
    ----------
    file : path
        Is made, 320 KiB.
    names : dict
        Names that have numbers already: those of messages have their tags.
    """

    def __init__(self, file: Path, names: Mapping[int, str]) -> None:
        with open(file, "x+b") as opened:
            opened.truncate(SIZE)
            self.memory = mmap.mmap(opened.fileno(), SIZE)
        self.memory[: len(MAGIC)] = MAGIC
        # Items 1, 2, 3: records, state, bytes of text. Set after what they count, so that a reader sees no half.
        self.head = memoryview(self.memory)[:HEAD].cast("Q")
        self.count = 0
        self.posts = 0
        self.step = 0
        self.names: dict[str, int] = {}
        self.comms: dict[tuple[str, tuple[int, ...]], int] = {}
        self.counts: defaultdict[int, dict[int, int]] = defaultdict(dict)
        """Of each communicator, how much was posted, by peer, tag and kind; communicators made anew share it."""
        for number, name in names.items():
            self.names[name] = number
            self._say(name=name, number=number)

    def write(self, kind: int, name: int, comm: int, peer: int, number: int, post: int, nbytes: int) -> None:
        """Add a record."""
        count = self.count
        place = RING + count % CAPACITY * WIDTH
        pack(self.memory, place, monotonic(), kind, name, comm, peer, number, post, nbytes)
        self.count = self.head[1] = count + 1

    def name(self, name: str) -> int:
        """Return the number of a name."""
        if name not in self.names:
            number = min(max(self.names.values(), default=0) + 1, NAMES - 1)
            self.names[name] = number
            self._say(name=name if number < NAMES - 1 else "other", number=number)
        return self.names[name]

    def comm(self, path: str, ranks: tuple[int, ...]) -> int:
        """Return the number of a communicator, from how it was made and its ranks of the watched one."""
        key = path, ranks
        if key not in self.comms:
            self.comms[key] = min(len(self.comms), COMMS - 1)
            self._say(comm=path, ranks=ranks, number=self.comms[key])
        return self.comms[key]

    def state(self, state: State, error: str = "") -> None:
        """Say how this rank stands to the watch from now on."""
        if error:
            self._say(error=error[-4000:])
        self.head[2] = state

    def _say(self, **facts: object) -> None:
        line = json.dumps(facts).encode() + b"\n"
        start = self.head[3]
        if start + len(line) <= TEXT:  # what has no room there has no name
            self.memory[HEAD + start : HEAD + start + len(line)] = line
            self.head[3] = start + len(line)


class Steps:
    """Reader of the records of a rank, in another process."""

    def __init__(self, file: Path) -> None:
        with open(file, "rb") as opened:
            self.memory = mmap.mmap(opened.fileno(), SIZE, access=mmap.ACCESS_READ)
        if self.memory[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{file} has no records of mpiattn.watch")

    @property
    def count(self) -> int:
        """How many records there are."""
        return self._head(1)

    @property
    def state(self) -> State:
        """How the rank stands to the watch."""
        return State(self._head(2))

    def _head(self, item: int) -> int:
        return int.from_bytes(self.memory[8 * item : 8 * item + 8], sys.byteorder)

    def text(self) -> list[dict[str, Any]]:
        """Return the lines of the text."""
        return [json.loads(line) for line in self.memory[HEAD : HEAD + self._head(3)].splitlines()]

    def record(self, index: int) -> Record:
        """Return the record of that number, one of the last `CAPACITY`."""
        return Record(*RECORD.unpack_from(self.memory, RING + index % CAPACITY * WIDTH))

    def records(self) -> Iterator[Record]:
        """Return the last records, in order; not the oldest ones, which the rank may be writing over."""
        count = self.count
        yield from map(self.record, range(max(0, count - CAPACITY + 16), count))
