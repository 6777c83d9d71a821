"""Measure parts of mpiattn side by side on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from ...messages.message import Communicator
from .. import watching
from ..terminal import Help
from . import attention, error, kernel, overlap, torch_train, train

BENCHMARKS: dict[str, tuple[Any, str]] = {
    "kernel": (kernel, "the NumPy kernel against its own matrix products, a textbook version and torch"),
    "overlap": (overlap, "how much of a message hides behind compute"),
    "error": (error, "whether results are as exact on many ranks as on one"),
    "attention": (attention, "algorithms beside themselves without messages, one kernel call and torch"),
    "train": (train, "training steps by each algorithm, beside what virtual ranks predict"),
    "torch": (torch_train, "training steps in torch by each algorithm, beside torch's context parallelism"),
}
"""Module and summary of each benchmark."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (module, summary) in BENCHMARKS.items():
        texts = {"help": summary, "description": module.DESCRIPTION, "epilog": module.EXAMPLES}
        benchmark = benchmarks.add_parser(name, **texts, formatter_class=Help)
        module.add_arguments(benchmark)
        watching.add_argument(benchmark)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Run the benchmark that the command line names; collective."""
    module, _ = BENCHMARKS[args.benchmark]
    return int(module.main(args, comm))
