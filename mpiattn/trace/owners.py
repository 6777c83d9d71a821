"""Owners of the queries, keys and sums in the blocks and the messages of a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ..problems.mask import Positions
from ..problems.problem import Problem
from .events import Event, Flow, Trace

PASSED_ON = ("Q", "KV")
"""Tags of chunks that start at their owner, each rank passing on what came, in its order."""

COMING_HOME = ("O", "D_Q", "D_KV")
"""Tags of sums that each rank adds to and passes on, and that end at their owner."""


def name_blocks(trace: Trace, problem: Problem) -> None:
    """Say of each block of a trace whose queries and whose keys it has, where they are one rank's each."""
    for event in trace.events:
        if event.kind == "compute" and event.block and event.sizes:
            pairs = zip(event.block, event.sizes, (problem.q_positions, problem.kv_positions), strict=True)
            q, kv = (_owner(first, size, positions) for first, size, positions in pairs)
            event.owners = (q, kv) if q is not None and kv is not None else None


def _owner(first: int, size: int, positions: Sequence[Positions]) -> int | None:
    """Return the rank that owns a position, unless there are more of them than it has."""
    for rank, own in enumerate(positions):
        place = int(np.searchsorted(own, first))
        if place < len(own) and own[place] == first:
            return rank if size <= len(own) else None
    return None


def of_messages(traces: Sequence[Trace], flows: Sequence[Flow]) -> dict[int, int]:
    """Return the owner of what messages carry, by the id of the event of the send.

    It follows from the order of the messages of one tag. Where that does not agree with the blocks that the ranks
    computed, or these are not known, the tag is left out.
    """
    named: dict[int, int] = {}
    for tag in (*PASSED_ON, *COMING_HOME):
        some = [flow for flow in flows if flow[1].name == tag]
        follow = _passed_on if tag in PASSED_ON else _coming_home
        found = follow(some)
        if found is not None and _agree(traces, some, found, tag):
            named |= found
    return named


def _in_order(flows: Sequence[Flow]) -> tuple[dict[int, list[Event]], dict[int, list[Event]]]:
    """Return the sends and the receives of each rank, in order."""
    sends, receives = defaultdict(list), defaultdict(list)
    for source, sent, dest, arrived in flows:
        sends[source].append(sent)
        receives[dest].append(arrived)
    for events in (*sends.values(), *receives.values()):
        events.sort(key=lambda event: event.start)
    return sends, receives


def _passed_on(flows: Sequence[Flow]) -> dict[int, int] | None:
    """A rank's first send is of its own chunk, the next one of what it received first, and so on."""
    sends, receives = _in_order(flows)
    send_of = {id(arrived): sent for _, sent, _, arrived in flows}
    found: dict[int, int] = {}
    for rank in sends:
        for place, sent in enumerate(sends[rank]):
            here, hop, event = rank, place, sent
            while hop:  # back to the rank before, until the owner's own send
                if hop > len(receives[here]):
                    return None
                event = send_of[id(receives[here][hop - 1])]
                here = next(one for one in sends if event in sends[one])
                hop = sends[here].index(event)
            found[id(sent)] = here
    return found


def _coming_home(flows: Sequence[Flow]) -> dict[int, int] | None:
    """Name the owners of sums: a sum that a rank receives is in its next send; the last one to arrive is its own."""
    sends, receives = _in_order(flows)
    receive_of = {id(sent): (dest, arrived) for _, sent, dest, arrived in flows}
    found: dict[int, int] = {}
    for rank in sends:
        for sent in sends[rank]:
            here, arrived = receive_of[id(sent)]
            while (hop := receives[here].index(arrived)) < len(receives[here]) - 1:
                if hop + 1 >= len(sends[here]):
                    return None
                here, arrived = receive_of[id(sends[here][hop + 1])]
            found[id(sent)] = here
    return found


def _agree(traces: Sequence[Trace], flows: Sequence[Flow], found: dict[int, int], tag: str) -> bool:
    """Say whether each rank has computed with the chunks that it received, or for the sums that it sent."""
    axis = 1 if tag in ("KV", "D_KV") else 0
    for rank, trace in enumerate(traces):
        blocks = [event for event in trace.events if event.kind == "compute"]
        if any(event.owners is None for event in blocks):
            return False
        used = {event.owners[axis] for event in blocks if event.owners}
        if tag in PASSED_ON:
            there = {found[id(sent)] for _, sent, dest, _ in flows if dest == rank}
            if not used <= there | {rank}:
                return False
        elif not {found[id(sent)] for source, sent, _, _ in flows if source == rank} <= used:
            return False
    return True
