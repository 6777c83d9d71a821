"""The adaptive tile: where communication, less what overlaps, meets compute."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...machines.machine import Machine
from ...planner.candidates import candidates, tile
from ...planner.estimate import estimate
from ...planner.simulate import simulate
from ...planner.task import Task
from ...problems.grid import grids
from .. import charts


def tile_curve(task: Task, machine: Machine, ranks: int, path: Path) -> list[dict[str, Any]]:
    """Draw compute, communication and total time of every mesh grid: the best tile is where the first two meet.

    Of the ways to place a grid on the nodes, the one with the best estimate.
    """
    instant = {
        name: dataclasses.replace(rates, forward=(1e30,), backward=(1e30,), tokens=(1,), call=0.0)
        for name, rates in machine.compute.items()
    }
    silent = dataclasses.replace(machine, compute=instant)
    rows = []
    for b, a in reversed(grids(ranks)):
        placed = [candidate for candidate in candidates(ranks, machine, ["mesh"]) if candidate.grid == (b, a)]
        candidate = min(placed, key=lambda candidate: estimate(task, machine, ranks, candidate))
        outcome, alone = simulate(task, machine, ranks, candidate), simulate(task, silent, ranks, candidate)
        q, kv = tile(task, ranks, candidate)
        rows.append(
            {"rows": b, "cols": a, "queries": q, "keys": kv, "total": outcome.seconds, "compute": outcome.computed,
             "communication": alone.seconds, "exposed": outcome.exposed}
        )  # fmt: skip
    drawing, [axes] = charts.figure(8.5, 5)
    labels = {
        "total": "total",
        "compute": "compute",
        "communication": "communication alone",
        "exposed": "communication not hidden",
    }
    series = {text: [1e3 * row[key] for row in rows] for key, text in labels.items()}
    title = f"{task.tokens} tokens on {ranks} ranks of {machine.name}: the tile's shape"
    charts.lines(axes, [row["cols"] for row in rows], series, xlabel="", ylabel="time (ms)", title=title)
    axes.set_xticks(
        [row["cols"] for row in rows],
        [f"{row['rows']} x {row['cols']}\n{_short(row['queries'])} x\n{_short(row['keys'])}" for row in rows],
        fontsize=8,
    )
    axes.set_xlabel("grid, rows x columns; below, the tile: queries x keys (tokens)")
    best = min(rows, key=lambda row: row["total"])
    axes.axvline(best["cols"], color="0.5", linewidth=1, zorder=0)
    charts.save(drawing, path)
    return rows


def _short(tokens: float) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"
