"""Check an implementation of attention against the oracle: values, gradients, and every byte it receives.

By default all of mpiattn's algorithms. With --module MODULE:FACTORY yours, a module of the current folder or an
installed one, in which FACTORY is a class or a function:

  class MyRing:
      def __init__(self, comm, layout, mask, scale):  # an mpi4py communicator: Create_cart, Sub, Isend, Sendrecv, ...
          if str(mask) not in ("full", "causal"):     # what it can't do it says, on all ranks: the case is refused
              raise NotImplementedError("masks other than full and causal")
      def forward(self, q, k, v):                     # NumPy arrays (batch, heads, this rank's tokens, head_dim)
          return out, saved                           # saved: anything; saved.lse, if it has one, is checked too
      def backward(self, d_out, saved):
          return d_q, d_k, d_v                        # all in the dtype of q

It may have __enter__ and __exit__, too. scale is a number or None, which means 1/sqrt(head_dim). K and V may have
fewer heads. Which tokens a rank has follows from the layout, and what a query sees from the mask:

  from mpiattn.problems.layout import positions       # positions(layout, tokens, comm.size, comm.rank) -> int64
  from mpiattn.problems.mask import allowed           # allowed(mask, query_positions, key_positions) -> bool array

Some cases have the options softcap or partials, give `forward` sinks=ARRAY or dropout=mpiattn.Dropout(...), and ask for
sink_gradient(d_out, saved) -> d_sinks. Refused are cases in which it raises NotImplementedError or mpiattn.InputError,
and with these options and arguments also TypeError or another ValueError. What else it raises is a failure.

Bytes are counted where messages go over the communicator that it is given, or one made from it; what can't be counted
is named. --formula ring compares them with what mpiattn's own algorithm receives. An implementation without mpi4py is
judged by its results with --results-only: FACTORY gets the options alone, and torch.distributed.init_process_group()
finds the other ranks.

Choose cases by --layout, --mask, --dtype and sizes. examples/foreign_ring.py is a whole implementation:

  mpiexec -n 3 mpiattn conformance --module foreign_ring:attention --layout contiguous --mask causal --tokens 12,48

Exit status 1 if any case is wrong; each is printed with what to run it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from ...algorithms import ALGORITHMS
from ...algorithms.spelling import spell
from ...arrays import FLOATS
from ...conformance.case import Case, fast, matrix
from ...conformance.check import check
from ...conformance.meeting import watched
from ...conformance.player import Received, Refused
from ...conformance.selection import select
from ...conformance.user_masks import parse
from ...errors import InputError
from ...messages.message import Communicator
from ...planner.units import counts
from ...problems.layout import LAYOUTS
from .. import chosen, gpu
from ..progress import bar
from . import report
from .players import find

CHOSEN = ("layout", "mask", "dtype", "tokens", "heads", "kv_heads", "head_dim")
"""Values of a case by which cases are chosen."""

FLOAT_NAMES = [dtype.name for dtype in FLOATS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn conformance`."""
    which = parser.add_mutually_exclusive_group()
    chosen.add_algorithms(which, "all")
    which.add_argument("--module", metavar="MODULE:FACTORY", help="an implementation of your own")
    parser.add_argument("--full", action="store_true", help="the whole matrix, not the part that has one of everything")
    parser.add_argument(
        "--share",
        type=share,
        default=(0, 1),
        metavar="I/N",
        help="share I of N of the cases, from 1: for N runs side by side",
    )
    parser.add_argument("--case", type=Case.parse, metavar="'NAME=VALUE ...'", help="this case alone")
    parser.add_argument("--forward-only", action="store_true", help="judge no gradients")
    group = parser.add_argument_group("cases", "each with these values in place of its own; several between commas")
    group.add_argument("--layout", type=values(LAYOUTS), metavar="NAME,...", help=f"of {', '.join(LAYOUTS)}")
    group.add_argument("--mask", action="append", metavar="MASK", help="such as causal or window=5; may be repeated")
    group.add_argument("--dtype", type=values(FLOAT_NAMES), metavar="NAME,...", help=f"of {', '.join(FLOAT_NAMES)}")
    for name, what in (("tokens", "of the sequence"), ("heads", "of queries"), ("kv-heads", ""), ("head-dim", "")):
        group.add_argument(f"--{name}", type=counts, metavar="N,...", help=what)
    group = parser.add_argument_group("an implementation of your own")
    group.add_argument("--results-only", action="store_true", help="its factory takes no communicator")
    group.add_argument(
        "--formula", type=partial(chosen.one, among=tuple(ALGORITHMS)), metavar="NAME",
        help="check that it receives what this algorithm of mpiattn does: ring, mesh:2x2",
    )  # fmt: skip
    group.add_argument(
        "--patience", type=float, default=120, metavar="SECONDS", help="for one case; then the run ends (default 120)"
    )
    gpu.add_arguments(parser)


def values(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return what reads names between commas from the command line."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return read


def share(text: str) -> tuple[int, int]:
    """Return which share, from 0, of how many."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: 1/4, 2/4, 3/4 or 4/4, for example")
    return int(number) - 1, int(count)


def cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for, or raise InputError."""
    wanted = {name: getattr(args, name) for name in CHOSEN if getattr(args, name) is not None}
    asked = {"--full": args.full, "--share": args.share != (0, 1)}
    asked |= {f"--{name.replace('_', '-')}": True for name in wanted}
    for option, given in asked.items():
        if given and args.case:
            raise InputError(f"{option} and --case exclude each other: a case is run alone")
    for option, given in (("--results-only", args.results_only), ("--formula", args.formula is not None)):
        if given and not args.module:
            raise InputError(f"{option} goes with --module")
    if args.results_only and args.formula:
        raise InputError("--formula needs messages that are counted: it does not go with --results-only")
    if args.case:
        return [args.case]
    for text in wanted.get("mask", ()):
        try:
            parse(text)
        except ValueError as error:
            raise InputError(str(error)) from None
    first, step = args.share
    result = select(matrix() if args.full else fast(), wanted)
    if not result:
        raise InputError("no case is left: the heads are no multiple of the K/V heads, or the mask has other tokens")
    return result[first::step]


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Check every case of every implementation; print what is wrong on rank 0."""
    chosen_cases = cases(args)
    watched_comm: Any = comm
    if args.module and hasattr(comm, "recorder"):
        comm = (
            watched_comm.comm
        )  # an ordinary program is given a communicator of MPI, and no watched one; see --patience
    xp = gpu.namespace(args, comm)
    work = list(itertools.product(find(args, comm), chosen_cases))
    wrong: list[str] = []
    refused: list[report.Refusal] = []
    turns: list[Received] = []
    progress = bar(comm, total=len(work), unit="case")
    for (name, player), case in work:
        progress.set_postfix_str(name)
        alone = reproducer(comm, name, case, args)
        guard = watched(comm, alone, args.patience) if player.foreign else contextlib.nullcontext()
        try:
            with guard:
                turns.append(check(player, comm, case, xp=xp))
        except AssertionError as error:
            wrong.append(f"{error}\n  alone: {alone}")
        except Refused as error:
            refused.append((name, *error.args))
        except InputError as error:
            if args.kernel is None:
                raise InputError(f"{name} refused {case}: {error}") from None
            refused.append((name, case, str(error)))
        progress.update()
    progress.close()
    notes = report.traffic(comm, work[0][0][1], turns) if args.module else []
    if comm.Get_rank() == 0:
        print(*report.refusals(refused), *wrong, sep="\n", end="\n" if refused or wrong else "", file=sys.stderr)
        passed = len(work) - len(wrong) - len(refused)
        count = f", {len(refused)} refused" if refused else ""
        print(f"{passed} passed, {len(wrong)} failed{count} on {comm.Get_size()} ranks", *notes, sep="\n")
        if args.module and len(refused) == len(work):
            print("every case was refused: nothing was checked", file=sys.stderr)
    return 1 if wrong or (args.module and len(refused) == len(work)) else 0


def reproducer(comm: Communicator, name: str, case: Case, args: argparse.Namespace | None = None) -> str:
    """Return the command that runs a case of an implementation alone."""
    which = ["--module" if args and args.module else "--algorithms", name, "--case", str(case)]
    if args:
        formula = spell(*args.formula) if args.formula else None
        for option, value in (("--arrays", args.arrays), ("--kernel", args.kernel), ("--formula", formula)):
            which += [option, value] if value else []
        for option, given in (("--forward-only", args.forward_only), ("--results-only", args.results_only)):
            which += [option] if given else []
    return f"mpiexec -n {comm.Get_size()} mpiattn conformance {shlex.join(which)}"
