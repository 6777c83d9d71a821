"""Show where the ranks run, with which software, and whether they get in each other's way."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ...machines import writing
from ...messages.message import Communicator
from .. import terminal
from ..root import on_root
from .environment import environment
from .groups import group, ranges
from .warnings import SOFTWARE

COLUMNS = {
    "host": "host",
    "cpu": "CPU",
    "cores": "cores",
    "omp_num_threads": "OMP_NUM_THREADS",
    "blas": "BLAS",
    "blas_threads": "BLAS threads",
    "devices": "GPUs",
}
"""Columns of the table, by the facts that they show of each rank."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn env`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the environment")


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Print the environment, once; write it where asked."""
    on_root(comm, lambda: writing.check(args.json))
    info = environment(comm, on_gpus=True)
    if comm.Get_rank() == 0:
        print(text(info))
    if args.json:
        on_root(comm, lambda: writing.write_json(args.json, info))
    return 0


def text(info: Mapping[str, Any]) -> str:
    """Return an environment as lines to read: software, a table of the ranks, warnings."""
    software = [(name.replace("_", " "), info[name]) for name in SOFTWARE]
    shown = [{**one, "cores": ranges(one["cores"]), "devices": ", ".join(one["devices"])} for one in info["ranks"]]
    columns = [name for name in COLUMNS if any(one[name] != "" for one in shown)]
    rows = [[ranges(numbers), *key] for key, numbers in group(shown, columns)]
    headers = ["ranks", *(COLUMNS[name] for name in columns)]
    table = terminal.table(rows, headers, ["CPU", "BLAS", "GPUs"], disable_numparse=True, missingval="-")
    warnings = "\n".join(f"warning: {sentence}" for sentence in info["warnings"])
    return "\n\n".join(filter(None, [tabulate(software, tablefmt="plain", disable_numparse=True), table, warnings]))
