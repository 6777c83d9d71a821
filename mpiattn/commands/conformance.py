"""Check an implementation of attention against the oracle: values, gradients, and every byte it receives.

By default all of mpiattn's algorithms. With --module PACKAGE:FACTORY yours: FACTORY is a class or a function
that is called with a communicator and the options layout, mask and scale, and returns a context manager with

  forward(q, k, v) -> out, saved        this rank's tokens; saved.lse is its log-sum-exp
  backward(d_out, saved) -> d_q, d_k, d_v

The communicator counts what is received: of mpi4py's messages it has Isend, Irecv, Allgatherv, Iallgatherv, Alltoallv.

Some cases have the options softcap or partials, give `forward` sinks=ARRAY or dropout=mpiattn.Dropout(...), and ask for
sink_gradient(d_out, saved) -> d_sinks. An implementation without such a feature raises TypeError, ValueError or
NotImplementedError on all ranks before the first message; the case then counts as refused.

Exit status 1 if any case is wrong; each is printed with what to run it alone.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import shlex
import sys
from collections.abc import Callable
from functools import partial

from ..algorithms import ALGORITHMS
from ..algorithms.spelling import spell
from ..conformance.case import Case, fast, matrix
from ..conformance.check import Factory, Refused, check
from ..costs import COSTS
from ..costs.traffic import Costs
from ..errors import InputError
from ..messages.message import Communicator
from . import chosen, gpu
from .progress import bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn conformance`."""
    which = parser.add_mutually_exclusive_group()
    chosen.add_algorithms(which, "all")
    which.add_argument("--module", metavar="PACKAGE:FACTORY", help="an implementation of your own")
    parser.add_argument("--full", action="store_true", help="the whole matrix, not the part that has one of everything")
    parser.add_argument(
        "--share",
        type=share,
        default=(0, 1),
        metavar="I/N",
        help="share I of N of the cases, from 1: for N runs side by side",
    )
    parser.add_argument("--case", type=Case.parse, metavar="'NAME=VALUE ...'", help="this case alone")
    gpu.add_arguments(parser)


def share(text: str) -> tuple[int, int]:
    """Return which share, from 0, of how many."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: 1/4, 2/4, 3/4 or 4/4, for example")
    return int(number) - 1, int(count)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Check every case of every implementation; print what is wrong on rank 0."""
    for option, given in (("--full", args.full), ("--share", args.share != (0, 1))):
        if given and args.case:
            raise InputError(f"{option} and --case exclude each other: a case is run alone")
    xp = gpu.namespace(args, comm)
    implementations = find(args, comm)
    chosen = [args.case] if args.case else matrix() if args.full else fast()
    first, step = args.share
    work = list(itertools.product(implementations, chosen[first::step]))
    wrong, refused = [], []
    progress = bar(comm, total=len(work), unit="case")
    for (name, factory, traffic), case in work:
        progress.set_postfix_str(name)
        try:
            check(factory, comm, case, traffic, xp)
        except AssertionError as error:
            wrong.append(f"{error}\n  alone: {reproducer(comm, name, case, args)}")
        except Refused as error:
            refused.append(f"{name} refused {error}")
        except InputError as error:
            if args.kernel is None:
                raise InputError(f"{name} refused {case}: {error}") from None
            refused.append(f"{name} refused {case}: {error}")
        progress.update()
    progress.close()
    if comm.Get_rank() == 0:
        print(*refused, *wrong, sep="\n", end="\n" if refused or wrong else "", file=sys.stderr)
        passed = len(work) - len(wrong) - len(refused)
        count = f", {len(refused)} refused" if refused else ""
        print(f"{passed} passed, {len(wrong)} failed{count} on {comm.Get_size()} ranks")
    return 1 if wrong else 0


def reproducer(comm: Communicator, name: str, case: Case, args: argparse.Namespace | None = None) -> str:
    """Return the command that runs a case of an implementation alone."""
    which = ["--module" if args and args.module else "--algorithms", name, "--case", str(case)]
    for option, given in (("--arrays", args.arrays), ("--kernel", args.kernel)) if args else ():
        which += [option, given] if given else []
    return f"mpiexec -n {comm.Get_size()} mpiattn conformance {shlex.join(which)}"


def find(args: argparse.Namespace, comm: Communicator) -> list[tuple[str, Factory, Callable[..., Costs] | None]]:
    """Return name, factory and formula of each implementation that is asked for."""
    given = {key: value for key, value in gpu.options(args).items() if value not in (None, "auto")}
    if args.module:
        package, _, name = args.module.partition(":")
        try:
            factory = getattr(importlib.import_module(package), name)
            return [(args.module, partial(factory, **given) if given else factory, None)]
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"--module {args.module}: {error}") from None
    found: list[tuple[str, Factory, Callable[..., Costs] | None]] = []
    for name, arguments in chosen.expand(args, comm.Get_size())[0]:
        factory, formula = partial(ALGORITHMS[name], **arguments, **given), partial(COSTS[name], **arguments)
        found.append((spell(name, arguments), factory, formula))
    return found
