"""Grids of ranks: rows x cols = n; rank (r, c) has index r * cols + c."""

from __future__ import annotations

import argparse
import re
from typing import Any

from .scalars import shown, whole


def grids(ranks: int) -> list[tuple[int, int]]:
    """Return every (rows, cols) with rows * cols = ranks."""
    return [(rows, ranks // rows) for rows in range(1, ranks + 1) if ranks % rows == 0]


def lines(rank: int, rows: int, cols: int) -> tuple[range, range]:
    """Return the ranks of a rank's row and those of its column."""
    r, c = divmod(rank, cols)
    return range(r * cols, (r + 1) * cols), range(c, rows * cols, cols)


def squarest(ranks: int) -> tuple[int, int]:
    """Return the grid nearest to a square, with no more columns than rows."""
    return min(grids(ranks), key=lambda grid: (abs(grid[0] - grid[1]), grid[1]))


def check(ranks: int, rows: int | None, cols: int | None) -> tuple[int, int]:
    """Return (rows, cols), completed where one or both are None, or raise ValueError with those that fit."""
    if rows is None and cols is None:
        return squarest(ranks)
    given = rows, cols
    rows, cols = (None if number is None else whole(number) or 0 for number in given)
    if any(number is not None and number < 1 for number in (rows, cols)):
        shapes = " and ".join(map(shown, given))
        raise ValueError(f"rows and cols of a grid are whole numbers, 1 or more, got {shapes}")
    choice = (rows or ranks // (cols or 1), cols or ranks // (rows or 1))
    if choice not in grids(ranks):
        fits = ", ".join(f"{r}x{c}" for r, c in grids(ranks))
        raise ValueError(f"a grid of {'x'.join(map(shown, choice))} does not hold {ranks} ranks: choose from {fits}")
    return choice


def pair(shape: object) -> tuple[int | None, int | None]:
    """Return (rows, cols) of a grid's shape, or of none what `check` refuses."""
    if shape is None:
        return None, None
    if isinstance(shape, tuple | list) and len(shape) == 2:
        return shape[0], shape[1]
    none: Any = [shape]
    return none, None


def parse(text: str) -> tuple[int, int]:
    """Return (rows, cols) from text such as `2x3`."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or "0" in match.groups():
        raise ValueError(f"a grid is ROWSxCOLS, such as 2x3, got {text!r}")
    return int(match[1]), int(match[2])


def argument(text: str) -> tuple[int, int]:
    """Read a grid from the command line."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
