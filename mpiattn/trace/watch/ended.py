"""Which of the ranks that ended did so first, as far as that is certain.

A launcher that loses a rank kills the others within a millisecond. It learns of a death when the process's sockets
close, which is before the kernel tells this process of it: on a busy machine a rank that was killed by the launcher can
be over earlier than the one that it was killed for. So the order in which ends are noticed proves nothing. Two things
do: a rank that was well when another one had begun to end did end later; and see `wires`. Where neither tells, the
report names all that may have been the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .state import Doing

EXITING = 0x4
"""Flag of a process that has begun to end (PF_EXITING of Linux), set before any of its sockets is closed."""


class Process(NamedTuple):
    """The state of a process: letter (T is stopped) and flags of its first thread, number of threads, start."""

    letter: str
    flags: int
    threads: int
    started: int


def process(pid: int) -> Process | None:
    """Return what Linux tells of a process; None where there is none, or the system is another one."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Process(words[0], int(words[6]), int(words[17]), int(words[19]))


def is_over(pid: int, started: int | None) -> bool:
    """Say whether a process that was started then has ended, and closed its files."""
    return over(process(pid), started)


def is_ending(pid: int, started: int | None) -> bool:
    """Say whether a process that was started then has begun to end, or is over."""
    if started is None:  # it could not be told in the first place
        return False
    now = process(pid)
    return over(now, started) or bool(now and now.flags & EXITING)


def over(now: Process | None, started: int | None) -> bool:
    """Say whether what Linux tells is of a process that has ended."""
    # The first thread may be over before others, of which the last one closes the files.
    return now is None or now.started != started or (now.letter in "ZX" and now.threads <= 1)


def first(ranks: Mapping[int, Doing]) -> list[int]:
    """Return the ranks of which each may have been the first to fail: one only, where that is certain.

    One that has left the block and ended may have done so well, or not: it makes others doubtful, and is no answer.
    """
    ill = {rank: doing for rank, doing in ranks.items() if doing.status in ("gone", "raised", "told")}
    if not ill:
        return []
    earliest = min(ill, key=lambda rank: (ill[rank].ill, ill[rank].well))
    ill |= {rank: doing for rank, doing in ranks.items() if doing.status == "left" and doing.ill < math.inf}
    return [rank for rank, doing in ill.items() if rank == earliest or doing.well < ill[earliest].ill]


def mark(ranks: Mapping[int, Doing]) -> None:
    """Tell the ranks that are gone and were certainly not the first from the others that are gone."""
    earliest = first(ranks)
    for rank, doing in ranks.items():
        if doing.status == "gone" and rank not in earliest:
            doing.status = "ended"  # by the launcher


def gone(ranks: Sequence[int]) -> str:
    """Return in words that these ranks are gone."""
    *most, last = ranks
    return f"ranks {', '.join(map(str, most))} and {last} are gone" if most else f"rank {last} is gone"


def shift(doing: Doing, sent: float, asked: float, said: float, heard: float) -> Doing:
    """Bring the times of a rank of another host to the clock of this one, as far as they are certain.

    That host was asked and answered, by its clock, at `asked` and `said`; this one sent the question and heard the
    answer, by its own, at `sent` and `heard`. What came so long after the question was no earlier than so long after it
    was sent, and what came so long before the answer no later than so long before it was heard.
    """
    doing.well += sent - asked
    doing.ill += heard - said
    return doing
