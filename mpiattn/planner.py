"""Which algorithm, and which grid, on which cluster: every candidate run in virtual time, the fastest first.

Candidates are the algorithms' own variants; those on a grid come with each way to place it on the nodes, that
is, with so many of its rows and columns inside a node. A candidate that a rank's memory can't hold, or that
moves so many bytes that it can't be the fastest, is not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import arrays, layout, virtual
from . import machine as machines
from . import mask as masks
from .algorithms import ALGORITHMS
from .costs import COSTS
from .machine import Machine
from .mask import Causal, Full, Mask
from .message import InputError
from .problem import Problem
from .virtual import Cluster, VirtualComm

APART = {
    "dense": "one rank does all the work",
    "shared_ring": "works inside one host",
    "tensor_parallel": "every rank holds the whole sequence",
    "decode": "is for a few new tokens",
}
"""Algorithms that are no candidates, and why."""


@dataclass(frozen=True)
class Task:
    """Attention of a whole sequence: what is to be planned.

    Attributes
    ----------
    tokens, heads, kv_heads, head_dim, batch : int
    dtype : str
    mask : Mask
    backward : bool
        Whether to plan for forward and backward together.
    layout : str, optional
        By default that of the algorithms.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    mask: Mask = field(default_factory=Full)
    backward: bool = True
    layout: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "kv_heads", "head_dim", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            legal = [heads for heads in range(1, self.heads + 1) if self.heads % heads == 0]
            raise InputError(f"{self.heads} heads can't share {self.kv_heads} K/V heads: choose one of {legal}")
        try:
            self.mask.check(self.tokens, self.tokens)
        except ValueError as error:
            raise InputError(str(error)) from None

    def problem(self, ranks: int) -> Problem:
        """Return the problem that it poses to so many ranks."""
        kind = self.layout or ("zigzag" if self.mask.causal else "contiguous")
        return Problem(
            ranks, self.batch, self.heads, self.kv_heads, self.head_dim, self.head_dim, self.tokens, self.tokens,
            arrays.dtype(self.dtype), layout.check(kind), self.mask,
        )  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An algorithm with its arguments, and how its grid lies on the nodes.

    Attributes
    ----------
    inside : (int, int), optional
        Rows and columns of the grid that lie inside a node; None: ranks in the order of the nodes.
    """

    algorithm: str
    arguments: tuple[tuple[str, Any], ...] = ()
    inside: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The algorithm and its arguments, as text."""
        return " ".join([self.algorithm, *(f"{key}={value}" for key, value in self.arguments)])

    def order(self, ranks: int) -> list[int]:
        """Return the place of each of the cluster's ranks in the communicator that the algorithm is given."""
        if self.inside is None:
            return list(range(ranks))
        (rows, cols), (near_rows, near_cols) = self.grid, self.inside
        places = np.arange(ranks).reshape(rows // near_rows, near_rows, cols // near_cols, near_cols)
        return [int(place) for place in places.transpose(0, 2, 1, 3).reshape(-1)]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        given = dict(self.arguments)
        return given["rows"], given["cols"]


@dataclass
class Outcome:
    """What a candidate takes in virtual time; seconds and bytes of the rank with the most.

    Attributes
    ----------
    forward, backward : float
        Seconds of each pass.
    computed : float
        Seconds in the kernel.
    exposed : float
        Seconds that a rank waits for messages, of the rank that waits longest.
    received : int
        Bytes.
    peak : int
        Bytes that a rank holds, its own Q, K, V, output and gradients included.
    """

    candidate: Candidate
    forward: float
    backward: float
    computed: float
    exposed: float
    received: int
    peak: int

    @property
    def seconds(self) -> float:
        """Seconds of both passes."""
        return self.forward + self.backward


def simulate(task: Task, machine: Machine, ranks: int, candidate: Candidate, limit: float = math.inf) -> Outcome:
    """Run the algorithm itself on the virtual cluster, with arrays without data; TimeoutError after `limit` seconds."""
    problem, order = task.problem(ranks), candidate.order(ranks)
    wide = arrays.dtype(task.dtype)

    def program(comm: VirtualComm) -> tuple[float, float, float, float, int, int]:
        rank = comm.me
        ordered = comm.Split(0, order[comm.Get_rank()]) if candidate.inside else comm
        build = ALGORITHMS[candidate.algorithm]
        options: dict[str, Any] = {"mask": task.mask, "layout": problem.layout, **dict(candidate.arguments)}
        with build(ordered, **options) as attention:
            start, waiting = rank.clock, rank.waiting
            tokens = len(problem.q_positions[ordered.Get_rank()])
            q = virtual.empty((task.batch, task.heads, tokens, task.head_dim), wide)
            k, v = (virtual.empty((task.batch, task.kv_heads, tokens, task.head_dim), wide) for _ in "kv")
            _, saved = attention.forward(q, k, v)
            middle = rank.clock
            if task.backward:
                d_out = virtual.empty(q.shape, wide)
                attention.backward(d_out, saved)
            return middle - start, rank.clock - middle, rank.computed, rank.waiting - waiting, rank.received, rank.peak

    columns = list(zip(*Cluster(ranks, machine, limit).run(program), strict=True))
    return Outcome(candidate, *(max(column) for column in columns))


def candidates(ranks: int, machine: Machine, algorithms: Sequence[str] | None = None) -> list[Candidate]:
    """Return every variant of every algorithm, those on grids with each way to place them on nodes."""
    names = [name for name in ALGORITHMS if name not in APART] if algorithms is None else list(algorithms)
    if unknown := [name for name in names if name not in ALGORITHMS]:
        raise InputError(f"unknown algorithm {', '.join(unknown)}: choose from {', '.join(ALGORITHMS)}")
    node = math.gcd(machine.ranks_per_node, ranks)
    result = []
    for name in names:
        for arguments in ALGORITHMS[name].variants(ranks):
            given = tuple(arguments.items())
            if name in ("mesh", "mesh_gathered") and 1 < node < ranks:
                rows, cols = arguments["rows"], arguments["cols"]
                ways = [(r, node // r) for r in range(1, node + 1) if node % r == 0]
                result += [Candidate(name, given, (r, c)) for r, c in ways if rows % r == 0 and cols % c == 0]
            else:
                result.append(Candidate(name, given))
    return result


def least(task: Task, machine: Machine, ranks: int, candidate: Candidate) -> float:
    """Return seconds that a candidate can't go below: its bytes over the fastest link, or its work, of rank 0."""
    problem = task.problem(ranks)
    cost = COSTS[candidate.algorithm](_shared(problem), 0, **dict(candidate.arguments))
    received = cost.forward.nbytes + (cost.backward.nbytes if task.backward else 0)
    return received / max(link.bandwidth for link in machine.links.values())


_PROBLEMS: dict[Problem, Problem] = {}


def _shared(problem: Problem) -> Problem:
    return _PROBLEMS.setdefault(problem, problem)


@dataclass
class Plan:
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
        """Return three lines on the choice: bytes, exposed time, memory."""
        best = self.best
        ring = next((outcome for outcome in self.outcomes if outcome.candidate.algorithm == "ring"), None)
        other = ring if ring not in (None, best) else (self.outcomes[1] if len(self.outcomes) > 1 else None)
        name = other.candidate.name if other else ""
        compare = {
            "bytes": f"; {name} {_bytes(other.received)}" if other else "",
            "time": f"; {name} {_seconds(other.seconds)}, of it {_seconds(other.exposed)} waiting" if other else "",
            "memory": f"; {name} {_bytes(other.peak)}" if other else "",
        }
        return [
            f"bytes: a rank receives {_bytes(best.received)}{compare['bytes']}",
            f"time: {_seconds(best.seconds)}, of it {_seconds(best.computed)} compute and {_seconds(best.exposed)} "
            f"waiting for messages{compare['time']}",
            f"memory: {_bytes(best.peak)} of {_bytes(self.memory)} a rank{compare['memory']}",
        ]


def plan(
    task: Task,
    machine: Machine,
    ranks: int,
    memory: float | None = None,
    algorithms: Sequence[str] | None = None,
    progress: Any = None,
) -> Plan:
    """Rank the candidates by virtual time.

    Parameters
    ----------
    memory : float, optional
        Bytes that a rank may use; by default the machine's.
    algorithms : names, optional
        Only these.
    progress : callable, optional
        Called with the number of candidates, then with each one's name when it is done.

    Raises
    ------
    InputError
        Where no candidate fits: it says what would.
    """
    if ranks < 1:
        raise InputError(f"ranks must be 1 or more, got {ranks}")
    limit = machine.memory if memory is None else memory
    if not limit > 0:
        raise InputError(f"memory must be more than 0 bytes, got {limit:g}")
    machine.rates(task.dtype)
    everyone = sorted(
        ((least(task, machine, ranks, candidate), number, candidate)
         for number, candidate in enumerate(candidates(ranks, machine, algorithms))),
        key=lambda entry: entry[:2],
    )  # fmt: skip
    fitting: list[Outcome] = []
    tight: list[Outcome] = []
    left_out: list[tuple[Candidate, str]] = []
    tried: dict[str, int] = {}
    for bound, _, candidate in everyone:
        fastest = min((outcome.seconds for outcome in fitting), default=math.inf)
        family = candidate.algorithm
        if bound > fastest and family != "ring":
            left_out.append((candidate, f"its bytes alone take {_seconds(bound)}"))
        elif tried.get(family, 0) >= TRIES:
            left_out.append((candidate, f"{TRIES} of the same algorithm with fewer bytes were tried"))
        else:
            tried[family] = tried.get(family, 0) + 1
            try:
                # Ring Attention is run to its end: the others are compared with it.
                patience = math.inf if family == "ring" else SLOWER * fastest
                outcome = simulate(task, machine, ranks, candidate, patience)
            except TimeoutError:
                left_out.append((candidate, f"takes more than {SLOWER} times as long as another"))
                continue
            except InputError as error:
                left_out.append((candidate, str(error)))
                continue
            (fitting if outcome.peak <= limit else tight).append(outcome)
        if progress:
            progress(candidate.name)
    if not fitting:
        raise InputError(_impossible(task, ranks, limit, tight, left_out))
    fitting.sort(key=lambda outcome: outcome.seconds)
    left_out += [(outcome.candidate, f"needs {_bytes(outcome.peak)} a rank") for outcome in tight]
    return Plan(task, machine, ranks, limit, fitting, left_out)


TRIES = 6
"""Variants of one algorithm that are run, those that move the fewest bytes first."""

SLOWER = 3
"""How many times as long as the fastest so far a candidate may take before it is given up."""


def _impossible(
    task: Task, ranks: int, limit: float, tight: Sequence[Outcome], left_out: Sequence[tuple[Candidate, str]]
) -> str:
    if not tight:
        return f"no algorithm can do this on {ranks} ranks: " + "; ".join(f"{c.name}: {why}" for c, why in left_out[:3])
    smallest = min(tight, key=lambda outcome: outcome.peak)
    more = 2 ** math.ceil(math.log2(smallest.peak / limit)) * ranks
    fits = int(task.tokens * limit / smallest.peak)
    return (
        f"{task.tokens} tokens on {ranks} ranks need at least {_bytes(smallest.peak)} a rank "
        f"({smallest.candidate.name}), {_bytes(limit)} are allowed: possible are about {fits} tokens, or {more} ranks"
    )


# Text


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _seconds(number: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if number * factor >= 1:
            return f"{number * factor:.3g} {unit}"
    return f"{number * 1e6:.3g} us"


def count(text: str) -> int:
    """Read a number of tokens, such as 4096, 128K or 1M (of 1024)."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    if not match or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, such as 4096, 128K or 1M")
    return int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]


def size(text: str) -> float:
    """Read a size of memory, such as 80GB or 512MB (of 1000), in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)i?[bB]?", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of memory, such as 80GB")
    return float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2].upper()]


def _mask(text: str) -> Mask:
    try:
        return masks.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is to be computed, and where."""
    parser.add_argument("--tokens", type=count, required=True, metavar="N", help="such as 128K or 1M")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads (default: as many)")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--dtype", default=None, help="default bfloat16 where the machine has it, else float32")
    parser.add_argument("--mask", type=_mask, default=Causal(), help="default causal")
    parser.add_argument("--layout", choices=layout.LAYOUTS, help="default: as the algorithms choose")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks, one a GPU or a core")
    parser.add_argument(
        "--machine", default="laptop", metavar="NAME", help=f"{', '.join(machines.presets())}, or a TOML file"
    )


def task_of(args: argparse.Namespace, machine: Machine) -> Task:
    """Return the task that the arguments describe."""
    dtype = args.dtype or ("bfloat16" if "bfloat16" in machine.compute else "float32")
    try:
        arrays.dtype(dtype)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Task(
        args.tokens, args.heads, args.kv_heads or args.heads, args.head_dim, args.batch, dtype, args.mask,
        args.backward, args.layout,
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn plan`."""
    add_task_arguments(parser)
    parser.add_argument("--backward", action="store_true", help="forward and backward (default: forward)")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="of a rank, such as 80GB (default: the machine's)")
    parser.add_argument("--algorithms", metavar="NAME,...", help="only these")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="draw time against the tile's shape (png, svg)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan")


def main(args: argparse.Namespace, comm: Any = None) -> int:
    """Print the candidates in the order of their time, and why the first one is; on rank 0 alone."""
    if comm is not None and comm.Get_rank() > 0:
        return 0
    from tabulate import tabulate

    machine = machines.load(args.machine)
    task = task_of(args, machine)
    names = args.algorithms.split(",") if args.algorithms else None
    result = plan(task, machine, args.ranks, args.memory, names)
    rows = [
        (
            outcome.candidate.name,
            "x".join(map(str, outcome.candidate.inside)) if outcome.candidate.inside else "in order",
            "x".join(map(str, tile(task, args.ranks, outcome.candidate))),
            _seconds(outcome.forward),
            _seconds(outcome.backward) if task.backward else "",
            _seconds(outcome.exposed),
            _bytes(outcome.received),
            _bytes(outcome.peak),
        )
        for outcome in result.outcomes
    ]
    headers = ("algorithm", "in a node", "tile, tokens", "forward", "backward", "waiting", "received", "memory")
    print(f"{task.tokens} tokens, {task.heads} heads ({task.kv_heads} for K/V) of {task.head_dim}, {task.dtype}, "
          f"mask {task.mask}, on {args.ranks} ranks of {machine.name}")  # fmt: skip
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 5))
    print(f"\n{result.best.candidate.name}", *result.explain(), sep="\n  ")
    if args.json:
        document = {
            "task": {**dataclasses.asdict(task), "mask": str(task.mask)},
            "machine": machine.name,
            "ranks": args.ranks,
            "outcomes": [dataclasses.asdict(outcome) for outcome in result.outcomes],
            "left_out": [{"candidate": candidate.name, "why": why} for candidate, why in result.left_out],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.curve:
        from .charts import tile_curve

        tile_curve(task, machine, args.ranks, args.curve)
    return 0


def tile(task: Task, ranks: int, candidate: Candidate) -> tuple[int, int]:
    """Return how many queries and keys a rank's tile has; ring and all-gather are tiles of one chunk of queries."""
    given = dict(candidate.arguments)
    chunk = -(-task.tokens // ranks)
    if candidate.algorithm in ("mesh", "mesh_gathered"):
        return chunk * given["cols"], chunk * given["rows"]
    if candidate.algorithm in ("ulysses", "hybrid"):
        group = given.get("ulysses", ranks)
        return chunk * group * given.get("cols", 1), chunk * group * given.get("rows", 1)
    return chunk, task.tokens
