"""The results of all ranks: a table, and time and bytes as bars."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...conformance import oracle
from ...messages.message import Communicator, virtual_time
from ...problems.mask import Positions
from .. import terminal
from ..charts import COLOURS, save
from ..inputs import Inputs, asked
from .trial import PASSES, RESULTS, Trial


def report(trial: Trial, comm: Communicator, mask: str) -> dict[str, Any]:
    """Return a trial's results with what all ranks measured, the same on every rank."""
    ranks = comm.allgather((trial.seconds, trial.waits, trial.received, trial.peak, trial.formula))
    seconds, waits, received, peaks, formulas = zip(*ranks, strict=True)
    errors = comm.bcast(trial.errors)
    tolerance = oracle.TOLERANCES[trial.attention.problem.dtype.name] if trial.attention.problem else 0
    result: dict[str, Any] = {
        "algorithm": trial.title,
        "name": trial.name,
        "grid": trial.grid,
        "layout": trial.attention.layout,
        "mask": mask,
    }
    for name in PASSES:
        result[f"{name}_seconds"] = statistics.median(map(max, zip(*(rank[name] for rank in seconds), strict=True)))
        result[f"{name}_wait_seconds"] = [statistics.median(rank[name]) for rank in waits]
        result[f"{name}_messages_received"] = [rank[name][0] for rank in received]
        result[f"{name}_bytes_received"] = [rank[name][1] for rank in received]
    measured = virtual_time() is None  # virtual ranks share the memory of one process
    result["peak_bytes"], result["formula_peak_bytes"] = list(peaks) if measured else None, list(formulas)
    result |= {f"error_{name}": error for name, error in zip(RESULTS, errors, strict=True)}
    result["ok"] = all(error <= tolerance for error in errors)
    return result


HEADERS = {
    "name": "algorithm",
    "layout": "layout",
    "forward": "forward\nms",
    "backward": "backward\nms",
    "waiting": "waiting\nms",
    "messages": "messages\nreceived",
    "megabytes": "MB\nreceived",
    "peak": "peak\nMB",
    "formula": "formula\nMB",
    "error": "error",
    "verdict": "",
}
"""Of the columns, which `row` fills."""

DROP = tuple(HEADERS[name] for name in ("formula", "peak", "messages", "waiting"))


def row(result: dict[str, Any]) -> dict[str, str]:
    """Return what the table shows of one result."""
    pairs = {
        key: [max(result[f"{name}_{key}"]) for name in PASSES]
        for key in ("wait_seconds", "messages_received", "bytes_received")
    }
    errors = {name: result[f"error_{name}"] for name in RESULTS}
    worst = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    return {
        "name": result["name"],
        "layout": result["layout"],
        **{name: f"{1e3 * result[f'{name}_seconds']:.1f}" for name in PASSES},
        "waiting": "+".join(f"{1e3 * value:.1f}" for value in pairs["wait_seconds"]),
        "messages": "+".join(str(value) for value in pairs["messages_received"]),
        "megabytes": "+".join(f"{value / 1e6:.2f}" for value in pairs["bytes_received"]),
        "peak": f"{max(result['peak_bytes']) / 1e6:.1f}" if result["peak_bytes"] else "",
        "formula": f"{max(result['formula_peak_bytes']) / 1e6:.1f}",
        "error": f"{errors[worst]:.1e}",
        "verdict": "ok" if result["ok"] else f"WRONG {worst}",
    }


def print_results(
    results: Sequence[dict[str, Any]], given: Inputs, queries: Positions | None, args: argparse.Namespace
) -> None:
    """Print the table."""
    shapes = ", ".join(f"{name} {tuple(getattr(given, name).shape)}" for name in "qkv")
    layouts = list(dict.fromkeys(result["layout"] for result in results))
    layout = f", layout {layouts[0]}" if len(layouts) == 1 else ""
    options = "".join(f", {name}{'' if value is True else f' {value}'}" for name, value in asked(args).items())
    line = f"{given.name}: {shapes}, {given.q.dtype.name}, mask {args.mask}{layout}{options}"
    print(terminal.fold(line, terminal.width()))
    ranks = len(results[0]["formula_peak_bytes"])
    simulated = getattr(args, "virtual", None) is not None
    if simulated:
        print(f"{ranks} virtual ranks of one host of the machine {args.machine}: all times are simulated.")
    shown = [row(result) for result in results]
    left = {"layout"} if layout else set()
    left |= {"peak"} if simulated else set()
    columns = [name for name in HEADERS if name not in left]
    cells = [[cell[name] for name in columns] for cell in shown]
    headers = [HEADERS[name] for name in columns]
    align = ["left", *["right"] * (len(columns) - 2), "left"]
    print(terminal.table(cells, headers, DROP, disable_numparse=True, colalign=align))
    checked = "all queries" if queries is None else f"{len(queries)} of {given.q.shape[2]} queries, chosen by seed"
    rounds = "slowest rank" if simulated else f"median of {args.iterations} rounds, slowest rank"
    memory = "Peak: memory beside the input, likewise; formula: the same, computed, without the kernel's tiles."
    if simulated:
        memory = "Formula: memory beside the input, without the kernel's tiles; virtual ranks share one process."
    for note in (
        f"Times: {rounds}. Waiting, messages, MB: forward+backward, the rank with the most. {memory}",
        "Error: of out, dQ, dK and dV the largest, relative to the largest value, against float64; "
        f"{checked}; at most {oracle.TOLERANCES[given.q.dtype.name]:.0e} is ok.",
    ):
        print(terminal.fold(note, terminal.width()))
    for name in ("q", "k", "v", "d_out"):
        numbers = getattr(given, name).astype(np.float64)
        for what, found in (("NaN", np.isnan(numbers)), ("infinite numbers", np.isinf(numbers))):
            if count := int(found.sum()):
                print(f"The input has {count} {what} in {name}: what depends on them is NaN, and nothing is verified.")


def plot(results: Sequence[dict[str, Any]], given: Inputs, path: Path) -> None:
    """Draw time and bytes of each trial as two rows of bars."""
    from matplotlib.figure import Figure

    names = [f"{result['name']}  {result['layout']}" for result in results]
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
    ranks = len(results[0]["formula_peak_bytes"])
    figure.suptitle(f"{given.name}: {ranks} ranks, {given.q.shape[2]} tokens, mask {results[0]['mask']}")
    save(figure, path)
