"""The results of all ranks: a table, and time and bytes as bars."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ...conformance import oracle
from ...messages.message import Communicator
from ...problems.mask import Positions
from ..charts import COLOURS, save
from ..inputs import Inputs
from .trial import PASSES, RESULTS, Trial


def report(trial: Trial, comm: Communicator, mask: str) -> dict[str, Any]:
    """Return a trial's results with what all ranks measured, the same on every rank."""
    ranks = comm.allgather((trial.seconds, trial.waits, trial.received, trial.peak, trial.formula))
    seconds, waits, received, peaks, formulas = zip(*ranks, strict=True)
    errors = comm.bcast(trial.errors)
    tolerance = oracle.TOLERANCES[trial.attention.problem.dtype.name] if trial.attention.problem else 0
    result: dict[str, Any] = {
        "algorithm": trial.title,
        "grid": trial.grid,
        "layout": trial.attention.layout,
        "mask": mask,
    }
    for name in PASSES:
        result[f"{name}_seconds"] = statistics.median(map(max, zip(*(rank[name] for rank in seconds), strict=True)))
        result[f"{name}_wait_seconds"] = [statistics.median(rank[name]) for rank in waits]
        result[f"{name}_messages_received"] = [rank[name][0] for rank in received]
        result[f"{name}_bytes_received"] = [rank[name][1] for rank in received]
    result["peak_bytes"], result["formula_peak_bytes"] = list(peaks), list(formulas)
    result |= {f"error_{name}": error for name, error in zip(RESULTS, errors, strict=True)}
    result["ok"] = all(error <= tolerance for error in errors)
    return result


HEADERS = (
    "algorithm", "grid", "layout", "forward\nms", "backward\nms", "waiting\nms", "messages\nreceived", "MB\nreceived",
    "peak\nMB", "formula\nMB", "error\nout", "error\ndQ", "error\ndK", "error\ndV", "",
)  # fmt: skip


def print_results(
    results: Sequence[dict[str, Any]], given: Inputs, queries: Positions | None, args: argparse.Namespace
) -> None:
    """Print the table."""
    shapes = ", ".join(f"{name} {tuple(getattr(given, name).shape)}" for name in "qkv")
    print(f"{given.name}: {shapes}, {given.q.dtype.name}, mask {args.mask}")
    rows = []
    for result in results:
        pairs = {
            key: [max(result[f"{name}_{key}"]) for name in PASSES]
            for key in ("wait_seconds", "messages_received", "bytes_received")
        }
        rows.append(
            [
                *(result[key] for key in ("algorithm", "grid", "layout")),
                *(f"{1e3 * result[f'{name}_seconds']:.1f}" for name in PASSES),
                " + ".join(f"{1e3 * value:.1f}" for value in pairs["wait_seconds"]),
                " + ".join(str(value) for value in pairs["messages_received"]),
                " + ".join(f"{value / 1e6:.2f}" for value in pairs["bytes_received"]),
                *(f"{max(result[key]) / 1e6:.1f}" for key in ("peak_bytes", "formula_peak_bytes")),
                *(f"{result[f'error_{name}']:.1e}" for name in RESULTS),
                "ok" if result["ok"] else "WRONG",
            ]
        )
    print(tabulate(rows, HEADERS, disable_numparse=True, stralign="right"))
    checked = "all queries" if queries is None else f"{len(queries)} of {given.q.shape[2]} queries, chosen by seed"
    print(
        f"Times: median of {args.iterations} rounds, slowest rank. Waiting, messages, MB: forward + backward, the rank "
        "with the most.\nPeak: memory beside the input, likewise; by formula, without the kernel's tiles.\n"
        f"Errors: relative to the largest value, against float64; {checked}; "
        f"at most {oracle.TOLERANCES[given.q.dtype.name]:.0e} is ok."
    )
    for name in ("q", "k", "v", "d_out"):
        if count := int(np.isnan(getattr(given, name).astype(np.float32)).sum()):
            print(f"The input has {count} NaN in {name}: what depends on them is NaN, and nothing is verified.")


def plot(results: Sequence[dict[str, Any]], given: Inputs, path: Path) -> None:
    """Draw time and bytes of each trial as two rows of bars."""
    from matplotlib.figure import Figure

    names = [f"{result['algorithm']} {result['grid']}  {result['layout']}" for result in results]
    places = np.arange(len(results))
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(results)), layout="constrained")
    times, bytes_received = figure.subplots(1, 2, sharey=True)
    for axes, key, unit, factor, reduce in (
        (times, "seconds", "time (ms)", 1e3, float),
        (bytes_received, "bytes_received", "received by the rank that receives most (MB)", 1e-6, max),
    ):
        left = np.zeros(len(results))
        for name, colour in zip(PASSES, COLOURS, strict=False):
            values = np.array([factor * reduce(result[f"{name}_{key}"]) for result in results])
            axes.barh(places, values, left=left, color=colour, label=name)
            left += values
        for place, value in zip(places, left, strict=True):
            axes.text(value, place, f" {value:,.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=8)
        axes.set_xlabel(unit)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    times.set_yticks(places, names)
    times.invert_yaxis()
    times.legend(frameon=False)
    ranks = len(results[0]["peak_bytes"])
    figure.suptitle(f"{given.name}: {ranks} ranks, {given.q.shape[2]} tokens, mask {results[0]['mask']}")
    save(figure, path)
