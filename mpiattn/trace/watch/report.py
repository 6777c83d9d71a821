"""The report: the cause, each rank in a line, and where the ranks are that it is about."""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping, Sequence

from .cause import cause
from .graph import Edge, edges
from .state import Doing, Wait

MOST = 40  # ranks that are printed, and causes
STACKS, FRAMES = 3, 12  # ranks whose stack is printed, and how deep


def report(ranks: Mapping[int, Doing], wrong: str, file: str) -> str:
    """Return the whole report.

    Parameters
    ----------
    ranks : dict
        What each rank is doing.
    wrong : str
        What was noticed.
    file : str
        Where the last steps are.
    """
    found = edges(ranks)
    culprits, causes = cause(ranks, found)
    lines = [f"mpiattn.watch: {wrong}; the job ends.", *(f"  cause: {text}" for text in causes[:MOST])]
    shown = [*culprits, *(rank for rank in ranks if rank not in culprits)][:MOST]
    lines += [f"  {describe(ranks[rank], found)}" for rank in sorted(shown)]
    if len(ranks) > len(shown):
        lines.append(f"  and {len(ranks) - len(shown)} ranks more")
    for rank in [rank for rank in culprits if ranks[rank].stack][:STACKS]:
        lines += [f"  rank {rank} is here:", *(f"    {line}" for line in ranks[rank].stack.splitlines())]
    return "\n".join([*lines, f"  the last steps of all ranks: mpiattn trace {file}"]) + "\n"


def describe(doing: Doing, found: Sequence[Edge]) -> str:
    """Return a line on what a rank does."""
    head = f"rank {doing.rank} on {doing.host}: " + (f"{doing.passes[-1]}, step {doing.step}: " if doing.passes else "")
    if doing.status in SAID:
        return head + SAID[doing.status]
    head += PREFIXES.get(doing.status, "")
    if not doing.waiting:
        posted = f"; posted: {', '.join(map(message, doing.waits))}" if doing.waits else ""
        return f"{head}waits for nothing, last step {doing.quiet:.1f} s ago{posted}"
    parts = [
        awaited(wait, [edge for edge in found if edge.rank == doing.rank and edge.wait == wait]) for wait in doing.waits
    ]
    return f"{head}has waited {doing.quiet:.1f} s for " + "; ".join(parts)


SAID = {
    "unknown": "does not answer",
    "left": "has left the block",
    "raised": "has left the block by an exception",
    "told": "has ended by a signal",
}
PREFIXES = {"stopped": "stopped; ", "gone": "gone; ", "ended": "ended by the launcher; "}


def awaited(wait: Wait, found: Sequence[Edge]) -> str:
    """Return what a rank waits for, and why it does not come."""
    missing = [edge.other for edge in found if edge.why == "missing"]
    if wait.kind == "collective":
        some = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        return message(wait) + (f", to which rank {some} has not come" if missing else "")
    if wait.kind == "receive":
        return f"{message(wait)}, which has {'not ' * bool(missing)}sent it"
    return f"{message(wait)}, which has {'not ' * bool(missing)}posted its receive"


def message(wait: Wait) -> str:
    """Return a message or a collective by name."""
    if wait.kind == "collective":
        return f"{wait.name} no. {wait.number} on {wait.over}"
    rank = f"rank {wait.peer}" if wait.peer >= 0 else "any rank"
    if wait.kind == "receive":
        return f"{wait.name} no. {wait.number} ({wait.nbytes} bytes) from {rank}"
    return f"its {wait.name} no. {wait.number} ({wait.nbytes} bytes) to leave for {rank}"


def readable(dump: str) -> str:
    """Return the frames of the main thread in what faulthandler wrote, with lines of source."""
    *_, thread = re.split(r"\n(?=(?:Current thread|Thread) )", dump)
    lines = []
    for file, number, name in re.findall(r'File "(.*)", line (\d+) in (.*)', thread)[:FRAMES]:
        source = linecache.getline(file, int(number)).strip()
        lines.append(f"{file}:{number} in {name}" + (f": {source}" if source else ""))
    return "\n".join(lines)
