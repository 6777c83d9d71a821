"""Predicted against measured: the measured times of `benchmarks/network/` beside virtual time on calibrated machines.

    python benchmarks/calibration/predict.py benchmarks/calibration/netns-4.toml=benchmarks/network/4-mha.json ...

Each argument names a description that `mpiattn calibrate` wrote on the same hosts, and measured times: those of
`benchmarks/network/`, or what `mpiattn bench attention --json` wrote. Writes predicted.json, .txt and .png
beside itself, or files with another name.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from mpiattn import machines
from mpiattn.algorithms import ALGORITHMS
from mpiattn.commands import charts
from mpiattn.planner import Candidate, Task, simulate
from mpiattn.planner.candidates import APART
from mpiattn.problems import mask

HERE = Path(__file__).parent


def main() -> None:
    """Predict, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="MACHINE.toml=MEASURED.json")
    parser.add_argument("--name", default="predicted", help="of the files (default predicted)")
    parser.add_argument("--title", default="all algorithms on 4, 9 and 16 hosts, 10 Mbit/s each", help="of the figure")
    args = parser.parse_args()
    rows: list[tuple[str, str, str, float, float, float]] = []
    differences: dict[int, list[float]] = {}
    for pair in args.pairs:
        description, _, measured = pair.partition("=")
        found = machines.load(description)
        for case, name, ranks, task, times in measurements(Path(measured)):
            family, _, shape = name.partition(" ")
            given = tuple(zip(("rows", "cols"), map(int, shape.split("x")), strict=True)) if shape else ()
            outcome = simulate(task, found, ranks, Candidate(family, given))
            for direction, seconds in times.items():
                predicted = sum(getattr(outcome, part) for part in direction.split("+"))
                rows.append((case, name, direction, seconds, predicted, predicted / seconds - 1))
                differences.setdefault(ranks, []).append(abs(rows[-1][5]))
    errors = [error for part in differences.values() for error in part]
    groups = [("all", errors), *((f"{ranks} ranks", differences[ranks]) for ranks in sorted(differences))]
    table = tabulate(
        [(*row[:3], f"{row[3]:.4g}", f"{row[4]:.4g}", f"{row[5]:+.1%}") for row in rows],
        ("case", "algorithm", "pass", "measured (s)", "predicted (s)", "difference"),
        disable_numparse=True,
    )
    picks = []
    for case, direction in dict.fromkeys((row[0], row[2]) for row in rows):
        grids = [row for row in rows if row[0] == case and row[2] == direction and row[1].startswith("mesh ")]
        if len(grids) < 2:
            continue
        chosen, real = min(grids, key=lambda row: row[4]), min(grids, key=lambda row: row[3])
        picks.append(
            f"{case} {direction}: chosen {chosen[1]}, {chosen[3] / real[3] - 1:.1%} slower than the best, {real[1]}"
        )
    text = [
        table, "",
        *(f"{name}, {len(part)} cases: median {statistics.median(part):.1%}, worst {max(part):.1%}"
          for name, part in groups), "",
        "the grid that the prediction chooses, by its measured time:", *picks,
    ]  # fmt: skip
    print("\n".join(text))
    (HERE / f"{args.name}.txt").write_text("\n".join(text) + "\n")
    keys = ("case", "algorithm", "pass", "measured", "predicted", "difference")
    document: dict[str, object] = {"median": statistics.median(errors), "worst": max(errors)}
    document["rows"] = [dict(zip(keys, row, strict=True)) for row in rows]
    (HERE / f"{args.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    drawing, [axes] = charts.figure(6.5, 6)
    for number, file in enumerate(dict.fromkeys(row[0].partition(",")[0] for row in rows)):
        points = [(row[3], row[4]) for row in rows if row[0].partition(",")[0] == file]
        axes.scatter(
            *zip(*points, strict=True), label=file, s=28, color=charts.COLOURS[number % len(charts.COLOURS)],
            marker=charts.MARKERS[(number + number // len(charts.COLOURS)) % len(charts.MARKERS)],
        )  # fmt: skip
    ends = min(row[3] for row in rows) * 0.8, max(row[3] for row in rows) * 1.25
    axes.plot(ends, ends, color="0.3", linewidth=1, label="equal")
    for factor in (1.15, 1 / 1.15):
        axes.plot(ends, [factor * end for end in ends], color="0.6", linewidth=0.8, linestyle=":",
                  label="15 % apart" if factor > 1 else None)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="measured time (s)", ylabel="predicted time (s)",
             title=args.title)  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
    charts.save(drawing, HERE / f"{args.name}.png")


def measurements(path: Path) -> Iterator[tuple[str, str, int, Task, dict[str, float]]]:
    """Yield case, algorithm, ranks, task, and the seconds of each pass."""
    document = json.loads(path.read_text())
    if isinstance(document, list):
        for row in document:
            name = row["name"].partition(":")[0]
            if name in ALGORITHMS and name not in APART and " " not in row["name"]:
                task = Task(
                    row["tokens"], row["heads"], row["kv_heads"], row["head_dim"], dtype=row["dtype"],
                    mask=mask.parse(row["mask"]), partials=row["partials"],
                )  # fmt: skip
                seconds = {name: statistics.median(values) for name, values in row["seconds"].items()}
                case = f"{path.stem}, {row['tokens']} tokens"
                yield case, row["name"].replace(":", " "), row["ranks"], task, seconds
        return
    sizes = document["tokens"] * document["ranks"], document["heads"], document["kv_heads"], document["head_dim"]
    for name, result in document["results"].items():
        seconds = {direction: statistics.median(result[direction]["seconds"]) for direction in ("forward", "backward")}
        yield path.stem, name, document["ranks"], Task(*sizes, dtype="float32", mask=mask.Full()), seconds


main()
