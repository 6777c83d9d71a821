"""Rank the candidates by virtual time.

An estimate says in which order they are run. A candidate that is estimated, or seen, to take much longer than
another is given up, and so are those of one algorithm after several with better estimates; Ring Attention is
always run, as what the others are compared with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import InputError
from ..machines import reading
from ..machines.machine import Machine
from ..problems.mask import Causal, Full
from ..problems.scalars import real, shown, whole
from .candidates import Candidate, candidates
from .estimate import estimate, held
from .simulate import Outcome, simulate
from .task import Task
from .units import in_bytes, in_seconds

TRIES, TIES = 4, 2
"""Variants of one algorithm that are run, those with the best estimates; and of those with the same estimate."""

SLOWER, FIRST = 1.5, 4
"""Times as long as the fastest so far that a candidate may take, and that the first of its algorithm may take."""

FEW, ALIKE = 6, 3
"""Candidates that a quick plan runs, and how many of them of one algorithm."""

GAIN, UNSURE = 1.05, 1.25
"""Gain in speed for which a quick plan runs a candidate, where the kernel's time allows it, and the largest error of an
estimate."""


@dataclass
class Ranking:
    """Candidates in the order of their time, and why others are not among them."""

    task: Task
    machine: Machine
    ranks: int
    memory: float
    outcomes: list[Outcome]
    left_out: list[tuple[Candidate, str]]

    @property
    def best(self) -> Outcome:
        """The fastest that the memory holds."""
        return self.outcomes[0]

    def explain(self) -> list[str]:
        """Return three lines on the choice: bytes, exposed time, memory; beside those of Ring Attention, or the next.

        Where the choice is Ring Attention itself, or it was not run, the next in the order takes its place.
        """
        best = self.best
        others = [outcome for outcome in self.outcomes[1:] if outcome.candidate.algorithm == "ring"]
        against = [*others, *self.outcomes[1:]][:1]
        if best.candidate.algorithm == "ring":
            against = self.outcomes[1:2]
        name = against[0].candidate.name if against else ""
        bytes_ = "".join(f"; {name} {in_bytes(o.received)}" for o in against)
        time = "".join(f"; {name} {in_seconds(o.seconds)}, of it {in_seconds(o.exposed)} waiting" for o in against)
        memory = "".join(f"; {name} {in_bytes(o.peak)}" for o in against)
        return [
            f"bytes: a rank receives {in_bytes(best.received)}{bytes_}",
            f"time: {in_seconds(best.seconds)}, of it {in_seconds(best.computed)} compute and "
            f"{in_seconds(best.exposed)} waiting for messages{time}",
            f"memory: {in_bytes(best.peak)} of {in_bytes(self.memory)} a rank{memory}",
        ]


def plan(
    task: Task,
    machine: Machine,
    ranks: int,
    memory: float | None = None,
    algorithms: Sequence[str] | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Ranking:
    """Rank the candidates by virtual time.

    Parameters
    ----------
    memory : float, optional
        Bytes that a rank may use; by default the machine's.
    algorithms : names, optional
        Only these.
    quick : bool
        Run only the few candidates with the best estimates: what `choose` does.
    progress : callable, optional
        Called with each candidate's name before it is run.

    Raises
    ------
    InputError
        Where no candidate fits: it says what would.
    """
    given, ranks = ranks, whole(ranks) or 0
    if ranks < 1:
        raise InputError(f"ranks must be a whole number, 1 or more, got {given!r}")
    reading.check_memory(8 * ranks**2, f"a plan for {ranks} ranks")
    limit = real(machine.memory if memory is None else memory) or 0
    if limit <= 0:
        raise InputError(f"memory must be more than 0 bytes, got {shown(memory)}")
    machine.rates(task.dtype)
    everyone = [(estimate(task, machine, ranks, one), one) for one in candidates(ranks, machine, algorithms)]
    everyone.sort(key=lambda pair: pair[0])
    search = _Search(task, machine, ranks, limit)
    for (seconds, _, least), candidate in everyone:
        if reason := search.hopeless(seconds, least, candidate, quick):
            search.left_out.append((candidate, reason))
            continue
        if progress:
            progress(candidate.name)
        search.ties[candidate.algorithm, seconds] += 1
        search.run(candidate, math.inf if candidate.algorithm == "ring" else search.patience(candidate))
    return search.result()


class _Search:
    """Results after some candidates have run."""

    def __init__(self, task: Task, machine: Machine, ranks: int, memory: float) -> None:
        self.task, self.machine, self.ranks, self.memory = task, machine, ranks, memory
        self.fitting: list[Outcome] = []
        self.left_out: list[tuple[Candidate, str]] = []
        self.tries: Counter[str] = Counter()
        self.ties: Counter[tuple[str, float]] = Counter()

    @property
    def fastest(self) -> float:
        return min((outcome.seconds for outcome in self.fitting), default=math.inf)

    def hopeless(self, seconds: float, least: float, candidate: Candidate, quick: bool) -> str:
        """Say why a candidate of that estimate, which can't take less than `least`, isn't worth a run, or nothing."""
        needed = held(self.task, self.ranks, candidate)
        if needed > self.memory:
            return f"needs {in_bytes(needed)} a rank"
        tries, most = self.tries[candidate.algorithm], ALIKE if quick else TRIES
        if tries >= most:
            return f"{most} of the same algorithm with better estimates were run"
        if self.ties[candidate.algorithm, seconds] >= TIES:
            return f"{TIES} of the same algorithm with the same estimate were run"
        if not self.fitting or candidate.algorithm == "ring":
            return ""
        if quick and least > self.fastest / GAIN:
            return f"computes for {in_seconds(least)}"
        if seconds > (self.fastest * UNSURE if quick else self.patience(candidate)):
            return f"is estimated at {in_seconds(seconds)}"
        return f"{FEW} with better estimates were run" if quick and self.tries.total() >= FEW else ""

    def patience(self, candidate: Candidate) -> float:
        """Return the seconds after which a candidate is given up."""
        return self.fastest * (SLOWER if self.tries[candidate.algorithm] else FIRST)

    def run(self, candidate: Candidate, patience: float) -> None:
        """Run one, and give up after so many seconds."""
        self.tries[candidate.algorithm] += 1
        try:
            outcome = simulate(self.task, self.machine, self.ranks, candidate, patience)
        except TimeoutError:
            self.left_out.append((candidate, f"takes more than {in_seconds(patience)}"))
        except InputError as error:
            self.left_out.append((candidate, str(error)))
        else:
            if outcome.peak <= self.memory:
                self.fitting.append(outcome)
            else:  # a rank between the first and the last
                self.left_out.append((candidate, f"needs {in_bytes(outcome.peak)} a rank"))

    def result(self) -> Ranking:
        """Return the plan, or raise InputError."""
        if not self.fitting:
            raise InputError(self.impossible())
        outcomes = sorted(self.fitting, key=lambda outcome: outcome.seconds)
        return Ranking(self.task, self.machine, self.ranks, self.memory, outcomes, self.left_out)

    def impossible(self) -> str:
        """Say why nothing fits, and what would."""
        task, memory = self.task, self.memory
        smallest = min((one for one, _ in self.left_out), key=lambda one: held(task, self.ranks, one))
        needed = held(task, self.ranks, smallest)
        if needed <= memory:
            reasons = "; ".join(f"{candidate.name}: {why}" for candidate, why in self.left_out[:3])
            return f"no algorithm can do this on {self.ranks} ranks: {reasons}"
        fits, peak = task.tokens, needed
        while peak > memory and fits:  # memory is nearly in proportion
            fits = int(0.999 * fits * memory / peak)
            peak = held(self.shorter(fits), self.ranks, smallest) if fits else 0
        if not fits:
            return f"not even one token fits into {in_bytes(memory)} a rank"
        more = self.ranks
        while peak > memory or more == self.ranks:
            more *= 2
            peak = min(held(task, more, one) for one in candidates(more, self.machine, [smallest.algorithm]))
        return (
            f"{task.tokens} tokens on {self.ranks} ranks need at least {in_bytes(needed)} a rank ({smallest.name}), "
            f"{in_bytes(memory)} are allowed: possible are about {fits} tokens, or {more} ranks"
        )

    def shorter(self, tokens: int) -> Task:
        """Return the task with so many tokens, of which documents have no part here."""
        task = self.task
        mask = Causal() if task.mask.causal else Full()
        return replace(task, tokens=tokens, kv_tokens=tokens if task.kv_tokens else None, mask=mask)
