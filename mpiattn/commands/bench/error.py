"""`mpiattn bench error`: whether results are as exact on many ranks as on one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...algorithms.spelling import spell
from ...errors import InputError
from ...machines import writing
from ...messages.message import Communicator
from ...planner.units import count
from .. import charts, chosen, terminal
from ..compare.trial import RESULTS
from ..env.environment import environment
from ..progress import bar
from ..root import on_root, patiently
from .exactness import attend, attend_virtually, errors, reference, sample

MOST = 1.5

DESCRIPTION = f"""\
Measure the error against textbook attention in float64 of one problem on 1, 2, 3, ... ranks, as many as mpiexec
started, and further on virtual ranks: the same algorithms and the same arithmetic on rank 0 alone.

The input is part of the real queries, keys and values that come with mpiattn, causal. An error is given

  rms      root mean square of the differences, over that of the right values
  largest  largest difference, over the largest right value

and for each result as a multiple of the error on one rank. The first is to stay within {MOST} of them. The second
is that of a single number, and varies more. Exit status 1 if the first does not stay there. What partial sums that
travel rounded to bfloat16 (partials "narrow") add to the errors is shown as well, and may exceed it.
"""

EXAMPLES = """\
example:
  mpiexec -n 9 mpiattn bench error --plot error.png
"""

KINDS = ("float32", "wide"), ("bfloat16", "wide"), ("bfloat16", "narrow")
"""Dtype of the input, and how partial sums travel."""

MEASURES = "rms", "largest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn bench error`."""
    chosen.add_algorithms(parser, "ring,mesh")
    parser.add_argument(
        "--virtual", dest="virtual_ranks", type=_numbers, default=[16, 32, 64], metavar="N,...", help="default 16,32,64"
    )
    parser.add_argument("--tokens", type=count, default=2048, metavar="N", help="at most, and by default, 2048")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw errors against ranks (.png, .svg, .pdf)")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure on real ranks, then on virtual ones; print the table on rank 0."""
    if args.tokens > 2048 or min(args.virtual_ranks, default=1) < 1:
        raise InputError("--tokens is from 1 to 2048, numbers of ranks are 1 or more")
    on_root(comm, lambda: writing.check(args.json))
    if args.plot:
        on_root(comm, lambda: charts.check(args.plot))
    surroundings = environment(comm)
    rank, size = comm.Get_rank(), comm.Get_size()
    results: list[dict[str, Any]] = []
    progress = bar(comm, total=len(KINDS) * len(args.algorithms) * (size + len(args.virtual_ranks)), unit="run")
    for dtype, partials in KINDS:
        given = sample(args.tokens, dtype)
        right = patiently(comm, partial(reference, given))
        for asked in args.algorithms:
            name = spell(*asked)
            kind = {"dtype": dtype, "partials": partials, "algorithm": name}
            for ranks in range(1, size + 1):
                progress.set_postfix_str(f"{dtype} {partials} {name}, {ranks} ranks")
                part = comm.Split(int(rank >= ranks), rank)
                wholes = attend(asked, part, given, partials) if rank < ranks else None
                part.Free()
                patiently(comm, bool)  # the others wait without taking the cores
                if wholes and right:
                    results.append({**kind, "ranks": ranks, **errors(wholes, right)})
                progress.update()
            for ranks in args.virtual_ranks:
                progress.set_postfix_str(f"{dtype} {partials} {name}, {ranks} virtual ranks")
                wholes = patiently(comm, partial(attend_virtually, asked, ranks, given, partials))
                if wholes and right:
                    results.append({**kind, "ranks": ranks, "virtual": True, **errors(wholes, right)})
                progress.update()
    progress.close()
    compare_with_one(results)

    def finish() -> None:
        print_results(results, args)
        if args.json:
            document = {
                "command": " ".join(["mpiattn", *sys.argv[1:]]),
                "environment": surroundings,
                "results": results,
            }
            writing.write_json(args.json, document)
        if args.plot:
            plot(results, args.plot)

    patiently(comm, finish)
    wide = [result for result in results if result["partials"] == "wide"]
    good = all(ratio <= MOST for result in wide for ratio in result["rms_ratio"])
    return 0 if comm.bcast(good) else 1


def compare_with_one(results: Sequence[dict[str, Any]]) -> None:
    """Add to each result its errors as multiples of those on one rank."""
    for result in results:
        [one] = [
            other
            for other in results
            if other["ranks"] == 1 and all(other[key] == result[key] for key in ("dtype", "partials", "algorithm"))
        ]
        for measure in MEASURES:
            pairs = zip(result[measure], one[measure], strict=True)
            result[f"{measure}_ratio"] = [error / (first or 1) for error, first in pairs]


def print_results(results: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table."""
    rows = [
        [
            *(result[key] for key in ("dtype", "partials", "algorithm", "ranks")),
            "virtual" if result.get("virtual") else "",
            *(f"{error:.1e}" for error in result["rms"]),
            *(f"{max(result[f'{measure}_ratio']):.2f}" for measure in MEASURES),
        ]
        for result in results
    ]
    headers = [
        "dtype",
        "partials",
        "algorithm",
        "ranks",
        "",
        *(f"rms {name}" for name in RESULTS),
        "rms\nratio",
        "largest\nratio",
    ]
    drop = [f"rms {name}" for name in reversed(RESULTS)]
    print(terminal.table(rows, headers, drop, disable_numparse=True, stralign="right"))
    print(f"{args.tokens} tokens, causal. Ratio: the largest of the four results', to that on one rank.")
    ranks = max(result["ranks"] for result in results if not result.get("virtual"))
    print(f"Made by: mpiexec -n {ranks} mpiattn {' '.join(sys.argv[1:])}")


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the errors against the number of ranks, as multiples of those on one rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 10), layout="constrained")
    panels = figure.subplots(len(KINDS), len(MEASURES), sharex=True, sharey=True)
    top = max(MOST, *(ratio for result in results for key in MEASURES for ratio in result[f"{key}_ratio"]))
    colours = dict(zip(RESULTS, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
    styles = dict(
        zip(dict.fromkeys(result["algorithm"] for result in results), ("-", "--", ":", "-.") * 4, strict=False)
    )
    for row, (dtype, partials) in zip(panels, KINDS, strict=True):
        for axes, measure in zip(row, MEASURES, strict=True):
            for algorithm, style in styles.items():
                own = [
                    r for r in results if (r["dtype"], r["partials"], r["algorithm"]) == (dtype, partials, algorithm)
                ]
                for number, (name, colour) in enumerate(colours.items()):
                    x, y = [r["ranks"] for r in own], [r[f"{measure}_ratio"][number] for r in own]
                    axes.plot(x, y, style, color=colour, linewidth=1.3, label=f"{algorithm}, {name}")
                    for virtual, face in ((False, colour), (True, "white")):
                        some = [bool(r.get("virtual")) == virtual for r in own]
                        axes.plot(
                            np.array(x)[some], np.array(y)[some], "o", color=colour, markerfacecolor=face, markersize=4
                        )
            axes.axhline(MOST, color="0.5", linewidth=0.8, linestyle=":")
            axes.set(title=f"{dtype}, {partials} partial sums, {measure} error", xscale="log", ylim=(0, 1.05 * top))
            axes.set_xticks(ticks := [1, 2, 4, 8, 16, 32, 64], ticks)
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("of the error on one rank")
    for axes in panels[-1]:
        axes.set_xlabel("ranks (hollow: virtual)")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    charts.save(figure, path)
