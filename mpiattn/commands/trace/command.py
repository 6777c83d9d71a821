"""Show what a file written with --trace recorded: timeline, time by phase, bytes from rank to rank.

The file has the events of all ranks on one clock, in the Chrome trace format, which ui.perfetto.dev and
chrome://tracing show too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from ...trace.events import Trace
from ...trace.file import read
from .. import charts, terminal
from ..terminal import width
from .figure import draw_trace
from .report import matrix, phases, summary, timeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn trace`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="written with --trace FILE")
    parser.add_argument(
        "--phase", metavar="TEXT", action="append", help="the first phase alone whose name has this text; also several"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the timeline (png, svg, pdf)")
    parser.add_argument("--width", type=int, metavar="N", help="columns of the text timeline (default: the terminal's)")


def main(args: argparse.Namespace) -> int:
    """Print what a trace says: timeline, time by phase, bytes from rank to rank; draw it where asked."""
    try:
        if args.plot:
            charts.check(args.plot)
        traces = read(args.file)
        chosen = [choose(args.file, traces, text) for text in args.phase or []]
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    for part in chosen or [traces]:
        show(part, args.width or width())
    if args.plot:
        names = [[name for name, _ in phases(part)] for part in chosen or [traces]]
        draw_trace(chosen or [traces], args.plot, [name[0] if len(name) == 1 else "" for name in names])
    return 0


def choose(file: Path, traces: Sequence[Trace], text: str) -> list[Trace]:
    """Return the first phase whose name has a text, or raise ValueError with the names that there are."""
    every = phases(traces)
    for name, parts in every:
        if text in name:
            return parts
    names = ", ".join(dict.fromkeys(name for name, _ in every))
    raise ValueError(f"no phase of {file} contains {text!r}: choose from {names}")


def show(traces: Sequence[Trace], columns: int) -> None:
    """Print timeline, times and bytes."""
    bytes_sent = matrix(traces)
    unit, divisor = ("MB", 1e6) if bytes_sent.max(initial=0) >= 1e6 else ("kB", 1e3)
    table = [
        [f"{source}", *(f"{value / divisor:.4g}" if value else "" for value in row)]
        for source, row in enumerate(bytes_sent)
    ]
    print(timeline(traces, columns), end="\n\n")
    print(summary(traces), end="\n\n")
    print(f"{unit} from rank (row) to rank (column), {bytes_sent.sum() / divisor:.4g} in all")
    headers = ["", *map(str, range(len(traces)))]
    print(terminal.table(table, headers, headers[:1:-1], disable_numparse=True, stralign="right"))
