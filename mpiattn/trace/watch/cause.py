"""The cause: where the ways of the graph end or close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .ended import first
from .graph import Edge, circle, reachable, way
from .state import Doing, Wait

Ranks = Mapping[int, Doing]

STATUSES = {
    "gone": "{who} is gone: killed, or ended without a word",
    "raised": "{who} raised an exception: {doing.error}",
    "stopped": "{who} is stopped: kill -CONT {doing.pid} on its host would continue it",
    "unknown": "no word from {who}: its host is down, or the network to it is cut or far too slow",
}
"""Sentence for a rank of this status, whatever the others wait for."""


PARTS = {
    "gone": "{who} is gone",
    "unknown": "no word from {who}",
    "told": "{who} ended by a signal",
    "left": "{who} has left the block and ended",
    "raised": "{who} raised an exception: {doing.error}",
}
"""The same of one of several of which nobody knows which was first."""


def cause(ranks: Ranks, found: Sequence[Edge]) -> tuple[list[int], list[str]]:
    """Return the ranks with which something is the matter, and what."""
    if answer := together(ranks, found):
        return answer
    for status, text in STATUSES.items():
        if culprits := [rank for rank, doing in ranks.items() if doing.status == status]:
            return culprits, [text.format(who=who(ranks[rank]), doing=ranks[rank]) for rank in culprits]
    waiting = [rank for rank, doing in ranks.items() if doing.waiting]
    if not waiting:
        inside = [rank for rank, doing in ranks.items() if doing.passes]
        return inside, [still(ranks[rank]) for rank in inside]
    waiting.sort(key=lambda rank: -ranks[rank].quiet)
    ways = (look(ranks, found, first) for look in (differing, ending, closed) for first in waiting)
    return next((answer for answer in ways if answer), None) or slow(ranks, waiting[0])


def together(ranks: Ranks, found: Sequence[Edge]) -> tuple[list[int], list[str]] | None:
    """Return the ranks of which nobody knows which was the first to fail; None where it is known."""
    silent = [rank for rank, doing in ranks.items() if doing.status == "unknown"]
    # An exception comes last: MPI raises one in a rank when another one ends.
    culprits = sorted([*first(ranks), *silent], key=lambda rank: (list(PARTS).index(ranks[rank].status), rank))
    if len(culprits) < 2 or all(ranks[rank].status != "gone" for rank in culprits):
        return None
    parts = [PARTS[ranks[rank].status].format(who=who(ranks[rank]), doing=ranks[rank]) for rank in culprits]
    text = f"{', '.join(parts)}: which of them was the first to fail is not known"
    missing = [edge for edge in found if edge.why == "missing"]
    ends = [rank for rank in culprits if reachable(rank, missing).isdisjoint({*culprits} - {rank})]
    if len(ends) == 1 and all(ends[0] in reachable(rank, missing) for rank in culprits):
        text += f"; the others waited for rank {ends[0]}"
    return culprits, [text]


def differing(ranks: Ranks, found: Sequence[Edge], first: int) -> tuple[list[int], list[str]] | None:
    """Return a rank and another one that calls a different collective in the place of its."""
    for edge in found:
        if edge.rank == first and edge.why == "differs":
            one, other = sorted([edge.rank, edge.other])
            calls = [f"{who(ranks[rank])} calls {ranks[rank].called[edge.wait.comm][1]}" for rank in (one, other)]
            where = f"as no. {edge.wait.number} of the collectives on {edge.wait.over}"
            return [one, other], [f"{', '.join(calls)}, {where}"]
    return None


def ending(ranks: Ranks, found: Sequence[Edge], first: int) -> tuple[list[int], list[str]] | None:
    """Return the rank at which the way from a waiting one ends."""
    missing = [edge for edge in found if edge.why == "missing"]
    ends = [rank for rank in reachable(first, missing) if rank in ranks and not ranks[rank].waiting]
    if not ends:
        return None
    path = way(first, ends, missing)
    return [path[-1].other], [f"{chain(path)}; {still(ranks[path[-1].other])}"]


def closed(ranks: Ranks, found: Sequence[Edge], first: int) -> tuple[list[int], list[str]] | None:
    """Return the ranks of a circle that a waiting one leads to."""
    round_trip = circle(first, [edge for edge in found if edge.why == "missing"])
    if not round_trip:
        return None
    return [edge.rank for edge in round_trip], [f"they wait for each other in a circle: {chain(round_trip)}"]


def slow(ranks: Ranks, first: int) -> tuple[list[int], list[str]]:
    """Return the ranks between which a message is under way."""
    wait = max(ranks[first].waits, key=lambda wait: wait.nbytes)
    if wait.kind == "collective":
        return [first], [f"all ranks have come to {wait.name}, and MPI does not complete it"]
    source, dest = (first, wait.peer) if wait.kind == "send" else (wait.peer, first)
    hosts = " to ".join(dict.fromkeys(ranks[rank].host for rank in (source, dest) if rank in ranks))
    text = f"{short(wait)} ({wait.nbytes} bytes) from rank {source} to rank {dest}"
    return [source, dest], [f"{text} is posted on both sides and does not arrive: a slow or broken network, {hosts}"]


def still(doing: Doing) -> str:
    """Return what a rank does that does not wait."""
    if doing.status == "left":
        return f"{who(doing)} has left the block that is watched"
    where = f"in {doing.passes[-1]}" if doing.passes else "outside of attention"
    return f"{who(doing)} makes no step {where}, for {doing.quiet:.1f} s now: a loop without end, or long work"


def who(doing: Doing) -> str:
    """Return a rank's number, host and process."""
    return f"rank {doing.rank} ({doing.host}, process {doing.pid})"


def chain(path: Sequence[Edge]) -> str:
    """Return the way in words, in a line that is not too long."""
    steps = [f"rank {edge.rank} waits for {short(edge.wait)} {between(edge.wait)} rank {edge.other}" for edge in path]
    return ", ".join(steps if len(steps) <= 6 else [*steps[:3], "...", *steps[-2:]])


def short(wait: Wait) -> str:
    """Return the name of a message or a collective with its number."""
    return f"{wait.name} no. {wait.number}"


def between(wait: Wait) -> str:
    """Return what stands before the other rank."""
    return {"send": "to be taken by", "receive": "from", "collective": "with"}[wait.kind]
