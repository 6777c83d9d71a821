"""The options of `mpiattn conformance`, and the cases that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from functools import partial

from ...algorithms import ALGORITHMS
from ...arrays import FLOAT_NAMES
from ...conformance.case import Case, fast, matrix
from ...conformance.selection import select
from ...conformance.user_masks import parse
from ...errors import InputError
from ...planner.units import counts
from ...problems.layout import LAYOUTS
from .. import chosen, gpu

CHOSEN = ("layout", "mask", "dtype", "tokens", "heads", "kv_heads", "head_dim")
"""Values of a case by which cases are chosen."""


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
