"""Algorithms with their arguments as text, the same wherever one is asked for or named.

ring    mesh:2x2    mesh rows=2 cols=2    hybrid:2x1 ulysses=2    allgather head_groups=2
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import InputError
from ..problems import grid
from . import ALGORITHMS

Asked = tuple[str, dict[str, Any]]
"""The name of an algorithm, and arguments of its constructor's own."""


def spell(name: str, arguments: Mapping[str, object]) -> str:
    """Return an algorithm with its arguments as text that `parse` reads."""
    rest = dict(arguments)
    shape = f":{rest.pop('rows')}x{rest.pop('cols')}" if {"rows", "cols"} <= rest.keys() else ""
    return " ".join([name + shape, *(f"{key}={value}" for key, value in rest.items())])


def parse(text: str, among: Collection[str] = ALGORITHMS) -> Asked:
    """Return the name and the arguments of an algorithm from text such as `mesh:2x2` or `mesh rows=2 cols=2`.

    Parameters
    ----------
    text : str
    among : collection of str
        The names that are taken; those of no algorithm, such as `auto`, have no arguments.

    Raises
    ------
    InputError
        Says what would be right.
    """
    first, *words = text.split() or [""]
    name, colon, shape = first.partition(":")
    if name not in among:
        raise InputError(f"unknown algorithm {name}: choose from {', '.join(among)}")
    known = examples(name) if name in ALGORITHMS else {}
    arguments: dict[str, Any] = {}
    if colon:
        if "rows" not in known:
            raise InputError(f"{name} has no grid")
        try:
            arguments = dict(zip(("rows", "cols"), grid.parse(shape), strict=True))
        except ValueError as error:
            raise InputError(f"{first}: {error}") from None
    for word in words:
        key, _, value = word.partition("=")
        if key not in known or key in arguments:
            takes = ", ".join(f"{one}=..." for one in known)
            raise InputError(f"{text!r}: {name} takes {f'{takes}, each once' if takes else 'no arguments'}")
        if isinstance(known[key], int) and not value.isdecimal():
            raise InputError(f"{text!r}: {key} is a whole number")
        arguments[key] = int(value) if isinstance(known[key], int) else value
    return name, arguments


def examples(name: str) -> dict[str, Any]:
    """Return the arguments that are an algorithm's own, each with a value that it can have."""
    return {key: value for variant in ALGORITHMS[name].variants(1) for key, value in variant.items()}


def variants(name: str, arguments: Mapping[str, object], ranks: int) -> list[dict[str, Any]]:
    """Return the arguments of each variant of an algorithm on so many ranks that has the given ones; maybe none."""
    return [variant for variant in ALGORITHMS[name].variants(ranks) if arguments.items() <= variant.items()]


def fitting(name: str, arguments: Mapping[str, object], ranks: int) -> list[dict[str, Any]]:
    """Return the same, or raise InputError where there is none: it names those that there are."""
    found = variants(name, arguments, ranks)
    if not found:
        choices = ", ".join(spell(name, one) for one in variants(name, {}, ranks))
        raise InputError(f"no {spell(name, arguments)} on {ranks} ranks: choose from {choices}")
    return found
