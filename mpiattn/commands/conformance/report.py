"""Refusals of implementations, and the traffic of a foreign one in all cases together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...conformance.case import Case
from ...conformance.player import Player, Received
from ...costs.traffic import Traffic
from ...messages.message import Communicator

Refusal = tuple[str, Case, str]
"""Of an implementation's name: the case, and the reason."""

NAMED = 3
"""Cases that are named of those that were refused for one reason."""


def refusals(refused: Sequence[Refusal]) -> list[str]:
    """Return a line for each reason, and one for each of the first cases."""
    reasons: dict[tuple[str, str], list[Case]] = {}
    for name, case, reason in refused:
        reasons.setdefault((name, reason), []).append(case)
    lines = []
    for (name, reason), cases in reasons.items():
        lines.append(f"{name} refused {len(cases)} case{'s' * (len(cases) > 1)}: {reason}")
        lines += [f"  {case}" for case in cases[:NAMED]]
        lines += [f"  and {len(cases) - NAMED} more"] if len(cases) > NAMED else []
    return lines


def traffic(comm: Communicator, player: Player, turns: Sequence[Received]) -> list[str]:
    """Return lines on the rank that receives most, and on what is not counted; all ranks call it together."""
    totals: dict[str, Traffic] = {}
    uncounted: Counter[str] = Counter()
    for received in turns:
        for name, seen in received.passes.items():
            totals[name] = totals.get(name, Traffic()) + seen
        uncounted += received.uncounted
    everything = comm.allgather((totals, uncounted))
    missing = sorted(set().union(*(received.unchecked for received in turns)))
    notes = [f"not checked: saved.{name}, which there is not" for name in missing]
    if not player.communicator or not turns:
        return notes
    most = {name: max((of_rank[name] for of_rank, _ in everything), key=lambda seen: seen.nbytes) for name in totals}
    calls: Counter[str] = sum((of_rank for _, of_rank in everything), Counter())
    if comm.Get_size() > 1 and not any(seen.messages for seen in most.values()):
        text = "over the communicator that it was given, or one made from it, came nothing that can be counted"
        return [f"received: unknown; {text}{names(calls)}", *notes]
    counts = ", ".join(f"{name} {seen.messages} messages, {seen.nbytes} bytes" for name, seen in most.items())
    return [f"received in all cases that passed, by the rank that receives most: {counts}{names(calls)}", *notes]


def names(calls: Counter[str]) -> str:
    """Return calls that are not counted as text."""
    if not calls:
        return ""
    return f"\nnot counted: {', '.join(f'{name} ({times} times)' for name, times in sorted(calls.items()))}"
