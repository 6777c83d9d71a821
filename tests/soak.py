"""Algorithms, shapes and grids at random, back to back in one job, for some minutes; see run/soak.sh.

Every result is checked against the oracle, the traffic against the formulas. Meanwhile the job must not grow: memory,
open files and MPI's communicators are those of its first part in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi4py import MPI

import mpiattn
from mpiattn.arrays import FLOATS
from mpiattn.commands.conformance.command import add_arguments, reproducer
from mpiattn.commands.conformance.players import find
from mpiattn.conformance.case import Case
from mpiattn.conformance.check import check
from mpiattn.conformance.player import Refused
from mpiattn.messages.private import KEYVAL, PrivateComm
from mpiattn.problems.layout import LAYOUTS

STUCK = 300.0  # seconds in a case without a step: the watch ends the job
BLOCK = 50  # cases in one watch; the next one watches anew
WARM = 0.2  # part of the time in which the job may grow: caches fill
MOST = 4000  # more than MPICH has room for
OPEN_MPI = "Open MPI" in MPI.Get_library_version()
MORE_MEMORY = 64 * 2**20  # bytes of a rank that are no growth: the allocator's


@dataclass
class Held:
    """What a rank holds: bytes of memory, open files, and communicators, counted from some number on, 0 not counted."""

    memory: int
    files: int
    communicators: int

    @classmethod
    def of(cls, comm: MPI.Intracomm, count: bool) -> Held:
        """Return what this rank holds now; collective where communicators are counted, which takes seconds."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        return cls(pages * resource.getpagesize(), files, communicators(comm) if count else 0)

    def growth(self, first: Held) -> list[str]:
        """Return what has grown since."""
        found = []
        if self.memory > 1.1 * first.memory + MORE_MEMORY:
            found.append(f"memory from {first.memory / 2**20:.0f} to {self.memory / 2**20:.0f} MiB")
        if self.files > first.files:
            found.append(f"open files from {first.files} to {self.files}")
        if self.communicators > first.communicators:
            found.append(f"communicators by {self.communicators - first.communicators}")
        return found


def communicators(comm: MPI.Intracomm) -> int:
    """Return how many communicators there are, counted from some number on; collective.

    Those of the shared windows do not count: there is one for each power of two that a case was large enough for.
    """
    probes: list[MPI.Intracomm] = []
    with contextlib.suppress(MPI.Exception):
        while len(probes) < (1 if OPEN_MPI else MOST):
            probes.append(comm.Dup())
    # Open MPI numbers them, and takes the lowest number that is free; MPICH has room for some 2,000.
    number = probes[0].py2f() if OPEN_MPI else MOST - len(probes)
    for probe in probes:
        probe.Free()
    private = comm.Get_attr(KEYVAL)
    return number - (len(private.kept.windows) if isinstance(private, PrivateComm) else 0)


def drawn(rng: random.Random, decodes: bool) -> Case:
    """Return a random case."""
    tokens, group, kv_heads = rng.choice((0, 1, 5, 20, 60, 120)), rng.randint(1, 3), rng.randint(1, 4)
    window = f"window={rng.randint(0, 90)},{rng.randint(0, 90)}"
    ends = sorted(rng.randint(0, tokens) for _ in range(rng.randint(0, 5)))
    lengths = [b - a for a, b in zip([0, *ends], [*ends, tokens], strict=True)]
    masks = ["full", "causal", window, f"{window}+causal", f"documents={','.join(map(str, lengths))}+causal"]
    return Case(
        layout=rng.choice(list(LAYOUTS)), mask="full" if decodes and rng.random() < 0.5 else rng.choice(masks),
        tokens=tokens, batch=rng.randint(1, 2), heads=group * kv_heads, kv_heads=kv_heads,
        head_dim=rng.randint(1, 20), v_head_dim=rng.randint(1, 20), dtype=rng.choice(FLOATS).name,
        softcap=rng.choice((None, None, 5.0)), partials=rng.choice(("wide", "narrow")),
        dropout=rng.choice((0.0, 0.0, 0.3)), sinks=rng.random() < 0.3, seed=rng.getrandbits(32),
    )  # fmt: skip


class Soak:
    """A job that checks cases, or builds attentions, and looks at what its ranks hold."""

    def __init__(self, comm: MPI.Intracomm, args: argparse.Namespace) -> None:
        self.comm, self.args = comm, args
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        self.found = find(parser.parse_args(["--algorithms", args.algorithms]), comm)
        self.rng = random.Random(args.seed)  # the same on every rank
        self.begun = time.monotonic()
        self.first: Held | None = None
        self.grown: list[str] = []

    def look(self, what: str, warm: bool, last: bool = False) -> None:
        """Print what the ranks hold; from when it is warm on, see whether it has grown."""
        gc.collect()
        held = Held.of(self.comm, count=last or (warm and self.first is None))
        if warm and self.first is None:
            self.first = held
        self.grown = held.growth(self.first) if self.first else []
        ranks = self.comm.gather((held, self.grown))
        for rank, (each, grown) in enumerate(ranks or ()):
            if rank == 0:
                holds = f"{each.memory / 2**20:.0f} MiB, {each.files} open files"
                holds += f", communicators {each.communicators}" if each.communicators else ""
                print(f"{time.monotonic() - self.begun:6.0f} s  {what}; rank 0: {holds}", flush=True)
            if grown:
                print(f"rank {rank} has grown since it was warm: {', '.join(grown)}", flush=True)

    def one(self) -> bool:
        """Check a case; return whether it was one that the algorithm takes."""
        name, player = self.rng.choice(self.found)
        case = drawn(self.rng, name.startswith("decode"))
        try:
            check(player, self.comm, case)
        except Refused:
            return False
        except AssertionError as error:
            raise AssertionError(f"{error}\n{reproducer(self.comm, name, case)}") from None
        return True

    def cases(self, minutes: float) -> None:
        """Check cases until the time is up."""
        checked = refused = 0
        end, warm = self.begun + 60 * minutes, self.begun + 60 * minutes * WARM
        shown = 0.0
        while self.comm.bcast(time.monotonic() < end):
            with mpiattn.watch(self.comm, seconds=STUCK):
                for _ in range(BLOCK):
                    taken = self.one()
                    checked, refused = checked + taken, refused + (not taken)
            if self.comm.bcast(time.monotonic() > shown + 60 * minutes / 20):
                shown = time.monotonic()
                self.look(f"{checked} cases right, {refused} refused", self.comm.bcast(shown > warm))
        self.look(f"{checked} cases right, {refused} refused: the end", True, last=True)

    def builds(self, count: int) -> None:
        """Build that many attentions inside `with`, and as many without, which nobody frees; use some of each."""
        for number in range(2 * count):
            name, player = self.rng.choice(self.found)
            attention = player.factory(self.comm)
            with contextlib.nullcontext() if number % 2 else attention:
                if number % 100 < 2 and not name.startswith(("decode", "tensor_parallel")):
                    mine = len(attention.positions(32))
                    out, _ = attention.forward(*(np.ones((1, self.comm.size, mine, 4), np.float32) for _ in "qkv"))
                    assert np.allclose(out, 1)
            if (number + 1) % max(2 * count // 20, 1) == 0:
                self.look(f"{number + 1} builds", number > WARM * count)
        self.look(f"{count} builds inside with, {count} without: the end", True, last=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--builds", type=int, default=0, help="so many builds, instead of cases for some minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithms", default="all")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    soak = Soak(comm, args)
    if comm.rank == 0:
        version = MPI.Get_library_version().partition("\n")[0].strip()[:60]
        print(f"{len(soak.found)} variants on {comm.size} ranks, seed {args.seed}; {version}", flush=True)
    soak.builds(args.builds) if args.builds else soak.cases(args.minutes)
    return 1 if any(comm.allgather(bool(soak.grown))) else 0


if __name__ == "__main__":
    sys.exit(main())
