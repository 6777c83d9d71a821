"""Waiting of ranks for ranks, as a graph, and where its ways end.

An edge leads from a rank to one that it waits for: one that has not posted the other half of a message, or that
has not come to a collective. Where both halves are posted, a message is under way, and no rank can do more for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .state import Doing, Wait, posted_key

OTHER_HALF = {"send": "receive", "receive": "send"}


@dataclass(frozen=True)
class Edge:
    """A rank waits for another one.

    Attributes
    ----------
    why : {"missing", "under way", "differs"}
        The other one has not posted its half or not come; both halves are posted; it calls something else.
    """

    rank: int
    other: int
    wait: Wait
    why: str


def edges(ranks: Mapping[int, Doing]) -> list[Edge]:
    """Return whom each rank waits for."""
    found = []
    for rank, doing in ranks.items():
        for wait in doing.waits if doing.waiting else []:
            if wait.kind != "collective" and wait.peer >= 0:
                other = ranks.get(wait.peer)
                key = posted_key(OTHER_HALF[wait.kind], wait.comm, rank, wait.name)
                there = other is not None and other.posted.get(key, 0) >= wait.number
                found.append(Edge(rank, wait.peer, wait, "under way" if there else "missing"))
            elif wait.kind == "collective":
                _, members = doing.comms.get(wait.comm, ("", ()))
                for member in members:
                    if member != rank and member in ranks and (why := _met(ranks[member], wait)):
                        found.append(Edge(rank, member, wait, why))
    return found


def _met(other: Doing, wait: Wait) -> str:
    """Return why a rank waits for another one in a collective, nothing where it does not."""
    number, name = other.called.get(wait.comm, (0, ""))
    if number < wait.number:
        return "missing"
    return "differs" if number == wait.number and name != wait.name else ""


def way(start: int, goals: Collection[int], found: Sequence[Edge]) -> list[Edge]:
    """Return the shortest way of edges from a rank to one of the goals; none where there is none, or it is one."""
    before: dict[int, Edge] = {}
    ranks = [start]
    for rank in ranks:
        if rank in goals:
            edges_back = []
            while rank != start:
                edges_back.append(before[rank])
                rank = before[rank].rank
            return edges_back[::-1]
        for edge in found:
            if edge.rank == rank and edge.other not in before and edge.other != start:
                before[edge.other] = edge
                ranks.append(edge.other)
    return []


def circle(start: int, found: Sequence[Edge]) -> list[Edge]:
    """Return edges that lead in a circle, of those that can be reached from a rank; none where there is none."""
    for rank in sorted(reachable(start, found)):
        for edge in found:
            if edge.rank == rank and (edge.other == rank or (back := way(edge.other, [rank], found))):
                return [edge, *([] if edge.other == rank else back)]
    return []


def reachable(start: int, found: Sequence[Edge]) -> set[int]:
    """Return the ranks that one waits for, and those that these wait for, and so on, itself included."""
    ranks: set[int] = set()
    new = {start}
    while new:
        ranks |= new
        new = {edge.other for edge in found if edge.rank in new} - ranks
    return ranks


def stuck(ranks: Mapping[int, Doing], seconds: float) -> list[int]:
    """Return the ranks that have waited so long, for others of which none has made a step since."""
    found = edges(ranks)
    still = {rank for rank, doing in ranks.items() if doing.quiet >= 0.9 * seconds or doing.status == "unknown"}
    return [
        rank
        for rank, doing in ranks.items()
        if doing.waiting and doing.quiet >= seconds and reachable(rank, found).intersection(ranks) <= still
    ]
