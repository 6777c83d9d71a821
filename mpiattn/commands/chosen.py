"""Which algorithms a command line asks for, and on which grids: the options, and what does not go together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from functools import partial

from ..algorithms import ALGORITHMS
from ..algorithms.spelling import Asked, examples, fitting, parse, spell, variants
from ..errors import InputError
from ..problems import grid

AUTO = "auto"
"""In place of an algorithm: what the planner chooses."""

ALL: list[Asked] = [(name, {}) for name in ALGORITHMS]

OF_RANKS = ("ulysses", "rows", "cols", "outer")
"""Arguments whose values go by the number of ranks; their product is at most that number."""

SPELLING = "also with arguments: mesh:2x2, 'allgather head_groups=2'"


def one(text: str, among: Collection[str] = (*ALGORITHMS, AUTO)) -> Asked:
    """Read an algorithm, or auto, from the command line."""
    try:
        return parse(text, among)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def several(text: str, among: Collection[str] = (*ALGORITHMS, AUTO)) -> list[Asked]:
    """Read algorithms between commas, or the word all, from the command line."""
    return ALL if text == "all" else [one(part, among) for part in text.split(",")]


def add_algorithms(parser: argparse._ActionsContainer, default: str, auto: bool = False) -> None:
    """Add the option of several algorithms."""
    among = (*ALGORITHMS, AUTO) if auto else tuple(ALGORITHMS)
    parser.add_argument(
        "--algorithms",
        type=partial(several, among=among),
        default=default,
        metavar="NAME,...",
        help=f"all, or of {', '.join(among)}; {SPELLING} (default {default})",
    )


def add_grid(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option of a grid."""
    named = ", ".join(filter(has_grid, ALGORITHMS))
    parser.add_argument("--grid", type=grid.argument, metavar="ROWSxCOLS", help=f"for {named} (default: {default})")


def check_machine(args: argparse.Namespace) -> None:
    """Raise InputError where a machine is named and nothing is simulated or planned."""
    asked = args.algorithms if hasattr(args, "algorithms") else [args.algorithm]
    if args.machine is not None and getattr(args, "virtual", None) is None and (AUTO, {}) not in asked:
        also = ["--virtual"] if hasattr(args, "virtual") else []
        goes_with = " or with ".join([*also, *([] if args.command == "conformance" else [f"the algorithm {AUTO}"])])
        raise InputError(f"--machine {args.machine} does nothing here: it goes with {goes_with}")


def on_grid(asked: Asked, args: argparse.Namespace, ranks: int) -> Asked:
    """Return an algorithm with the grid of `--grid` among its arguments, where there is that option and it has one.

    Raises
    ------
    InputError
        Where the algorithm is not to be had on that grid, or asks for ranks and there is only one.
    """
    name, given = asked
    shape = getattr(args, "grid", None)
    wanted = dict(given)
    if shape and has_grid(name):
        wanted |= {"rows": shape[0], "cols": shape[1]}
        if not given.items() <= wanted.items():
            raise InputError(f"{spell(name, given)} and --grid {shape[0]}x{shape[1]} exclude each other")
    needed = math.prod(wanted.get(key, 1) for key in OF_RANKS)
    if ranks == 1 < needed:
        virtual = f", or on virtual ones: --virtual {needed}" if hasattr(args, "virtual") else ""
        text = f"{spell(name, wanted)} takes {needed} ranks, and there is one"
        raise InputError(f"{text}: mpiexec -n {needed} mpiattn {args.command} ...{virtual}")
    if wanted.keys() & set(OF_RANKS):  # other arguments, such as head_groups, are judged by the algorithm itself
        fitting(name, wanted, ranks)
    return name, wanted


def has_grid(name: str) -> bool:
    """Say whether an algorithm has rows and columns."""
    return name in ALGORITHMS and "rows" in examples(name)


def check_grid(args: argparse.Namespace, algorithms: list[Asked]) -> None:
    """Raise InputError where a grid is given and none of the algorithms has one."""
    if getattr(args, "grid", None) and not any(has_grid(name) for name, _ in algorithms):
        names = ", ".join(name for name, _ in algorithms)
        raise InputError(f"--grid does not go with {names}, which has no rows and columns")


def expand(args: argparse.Namespace, ranks: int) -> tuple[list[Asked], list[str]]:
    """Return each variant of the algorithms of `--algorithms` that fits the grid, and what is left out and why.

    An algorithm that is named and does not fit is an error. Of "all" it is left out, unless the grid fits none.
    """
    found: list[Asked] = []
    errors: dict[str, InputError] = {}
    check_grid(args, args.algorithms)
    for asked in args.algorithms:
        try:
            name, given = on_grid(asked, args, ranks)
        except InputError as error:
            if args.algorithms != ALL:
                raise
            errors[asked[0]] = error
            continue
        every = variants(name, given, ranks) if name != AUTO else []
        found += [(name, arguments) for arguments in every or [given]]
    if errors and not any(has_grid(name) for name, _ in found):
        raise next(iter(errors.values()))
    return found, [f"{name}: {error}" for name, error in errors.items()]
