"""Show what a file written with --trace recorded: timeline, time by phase, bytes from rank to rank.

The file has the events of all ranks on one clock, in the Chrome trace format, which ui.perfetto.dev and
chrome://tracing show too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from ...errors import InputError
from ...trace.file import read
from .. import charts
from ..terminal import width
from .figure import draw_trace
from .report import matrix, phases, summary, timeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn trace`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="written with --trace FILE")
    parser.add_argument("--phase", metavar="TEXT", help="the first phase alone whose name contains this text")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the timeline (png, svg, pdf)")
    parser.add_argument("--width", type=int, metavar="N", help="columns of the text timeline (default: the terminal's)")


def main(args: argparse.Namespace) -> int:
    """Print what a trace says: timeline, time by phase, bytes from rank to rank; draw it where asked."""
    try:
        if args.plot:
            charts.check(args.plot)
        traces = read(args.file)
        if args.phase is not None:
            names = [name for name, _ in phases(traces)]
            if not any(args.phase in name for name in names):
                known = ", ".join(dict.fromkeys(names))
                raise ValueError(f"no phase of {args.file} contains {args.phase!r}: choose from {known}")
            traces = next(parts for name, parts in phases(traces) if args.phase in name)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    bytes_sent = matrix(traces)
    unit, divisor = ("MB", 1e6) if bytes_sent.max(initial=0) >= 1e6 else ("kB", 1e3)
    table = [
        [f"{source}", *(f"{value / divisor:.4g}" if value else "" for value in row)]
        for source, row in enumerate(bytes_sent)
    ]
    print(timeline(traces, args.width or width()), end="\n\n")
    print(summary(traces), end="\n\n")
    print(f"{unit} from rank (row) to rank (column), {bytes_sent.sum() / divisor:.4g} in all")
    print(tabulate(table, headers=["", *map(str, range(len(traces)))], disable_numparse=True, stralign="right"))
    if args.plot:
        names = [name for name, _ in phases(traces)]
        draw_trace(traces, args.plot, names[0] if len(names) == 1 else "")
    return 0
