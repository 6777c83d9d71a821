"""The terminal behind a command: how wide it is, whether there is one, and text and tables that fit it."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import tabulate

tabulate.MIN_PADDING = 0  # two columns more in each column whose header is its widest entry

WIDE = 100
"""Columns where there is no terminal, as in a file or under a batch system."""


def terminal(stream: int) -> str | None:
    """Return the device that a person watches behind standard output, 1, or standard error, 2; None: there is none.

    mpiexec stands between a rank and the terminal: the processes above are asked, too.
    """
    process = "self"
    for _ in range(5):
        try:
            device = os.readlink(f"/proc/{process}/fd/{stream}")
            if device.startswith(("/dev/pts/", "/dev/tty")):
                return device
            if not device.startswith(("pipe:", "socket:")):
                return None  # a file, or /dev/null
            with open(f"/proc/{process}/stat") as file:
                process = file.read().rpartition(")")[2].split()[1]
        except OSError:
            break
    return os.ttyname(stream) if os.isatty(stream) else None


def ready() -> None:
    """Let standard output and standard error be there and take any text.

    A shell or a scheduler may have closed them, as `>&-` does, or have an encoding without the characters of a file's
    name.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def to_stderr(text: str) -> None:
    """Write lines to standard error, in one piece.

    `print` writes the end of the last line apart where there are several or standard error has no buffer, and a
    launcher may put another rank's line between the two.
    """
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def width() -> int:
    """Return how many columns there are: what COLUMNS says, else the terminal, else `WIDE`."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return max(int(os.environ["COLUMNS"]), 20)
    if device := terminal(1):
        try:
            file = os.open(device, os.O_RDONLY | os.O_NOCTTY)
            try:
                return os.get_terminal_size(file).columns or WIDE
            finally:
                os.close(file)
        except OSError:
            pass
    return WIDE


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], drop: Sequence[str] = (), **options: Any) -> str:
    """Return a table that fits the terminal.

    Parameters
    ----------
    rows, headers
        Of `tabulate`; a header may have two lines.
    drop : sequence of str
        Headers of the columns that can be done without, the first to leave first; a line says which have left.
    options
        Of `tabulate`.
    """
    kept = list(range(len(headers)))
    for name in itertools.chain([None], drop):
        if name is not None:
            kept = [column for column in kept if headers[column] != name]
        # Columns that have an alignment of their own keep it.
        own = {key: [value[c] for c in kept] for key, value in options.items() if isinstance(value, (list, tuple))}
        shown = [[row[column] for column in kept] for row in rows]
        text = tabulate.tabulate(shown, [headers[column] for column in kept], **{**options, **own})
        if max(map(len, text.splitlines())) <= width():
            break
    left = [headers[column].replace("\n", " ") for column in range(len(headers)) if column not in kept]
    return text + (f"\nNo room in {width()} columns for: {', '.join(left)}." if left else "")


def fold(text: str, columns: int) -> str:
    """Return a text with its paragraphs filled anew; lines that are indented stay lines, and are folded where long."""
    folded: list[str] = []
    for kind, group in itertools.groupby(text.splitlines(), lambda line: line[:1] if line[:1] in (" ", "") else "text"):
        lines = list(group)
        if kind == "text":
            folded += textwrap.wrap(" ".join(lines), columns, break_on_hyphens=False)
            continue
        for line in lines:
            if len(line) > columns and re.match(r" *(mpiexec|mpiattn|run/\S+) (?!.*\S  )", line):
                parts = textwrap.wrap(line, columns - 2, subsequent_indent=" " * 6, break_on_hyphens=False)
                folded.append(" \\\n".join(parts))  # a command that can still be copied
                continue
            start = re.match(r" *(\S.*?\S  +)?", line)
            hanging = " " * min(len(start[0]) if start else 0, columns // 2)
            folded += textwrap.wrap(line, columns, subsequent_indent=hanging, break_on_hyphens=False) or [""]
    return "\n".join(folded)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that fits the terminal, descriptions too."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"width": width() - 2, **options})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return fold(textwrap.indent(text, indent), width)
