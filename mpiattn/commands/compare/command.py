"""Run algorithms side by side on the same input, forward and backward, and check each against the oracle.

By default every algorithm, grid and layout that fits the number of ranks, with a causal mask, on real input.
Times are the slowest rank's, medians over rounds in which the algorithms take turns; waiting is time spent
in waits for messages; errors are relative to the largest value, against textbook attention in float64, and those
of dQ and dK to no less than 1/256 of scale |d_out| |v| |k| or |q|: with large scores they are rests of such terms.
"""

from __future__ import annotations

import argparse
import itertools
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ...algorithms import ALGORITHMS
from ...conformance import oracle
from ...conformance.differences import cancelling
from ...errors import InputError
from ...machines import writing
from ...messages.message import Communicator
from ...problems import mask
from ...problems.layout import LAYOUTS
from ...problems.mask import Positions
from ...trace.comm import TracedComm
from ...trace.events import Trace
from ...trace.file import write
from .. import charts, chosen, gpu, inputs
from ..chosen import AUTO
from ..env.environment import environment
from ..inputs import Inputs
from ..progress import bar
from ..root import on_root, patiently
from .report import plot, print_results, report
from .trial import RESULTS, Right, Trial

ORACLE_SCORES = 2**28
"""Scores (heads x queries x keys) above which the oracle checks a sample of the queries."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn compare`."""
    chosen.add_algorithms(parser, "all", auto=True)
    chosen.add_grid(parser, "every grid")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: every layout")
    parser.add_argument("--mask", type=mask.argument, default="causal", help=mask.HELP)
    parser.add_argument("--scale", type=float, help="of the scores (default 1/sqrt(head_dim))")
    parser.add_argument("--iterations", type=int, default=3, metavar="N", help="timed rounds (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and bytes (.png, .svg, .pdf)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what each rank did, for mpiattn trace")
    inputs.add_arguments(parser)
    gpu.add_arguments(parser)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Check and measure every trial; print the table on rank 0. Return 1 on a mismatch."""
    xp = gpu.namespace(args, comm)
    surroundings = environment(comm, on_gpus=xp is not np)
    given = on_root(comm, lambda: load(args))
    with ExitStack() as stack:
        trials, left_out = build(args, comm, stack, given[0] if given else None)
        kept = Trace()
        right = patiently(comm, lambda: expected(*given, args) if given else None)
        progress = bar(comm, total=len(trials) * (1 + args.iterations), unit="run")
        for number, trial in itertools.product(range(1 + args.iterations), trials):
            progress.set_postfix_str(f"{trial.name} {trial.attention.layout}", refresh=False)
            if number == 0:
                trial.share(given[0] if given else None, args, xp)
                trial.check(given[1] if given else None, right)
            else:
                trial.measure(kept if args.trace else None)
            progress.update()
        progress.close()
        results = [report(trial, comm, str(args.mask)) for trial in trials]
    if args.trace:
        write(comm, kept, args.trace)
    if given:
        print_results(results, *given, args)
        for trial in trials:
            if trial.why:
                print(*trial.why, sep="\n  ")
        print(*(f"Left out: {reason}" for reason in dict.fromkeys(left_out)), sep="\n", end="\n" if left_out else "")

    def write_files() -> None:
        if args.json and given:
            asked = {"mask": str(args.mask), **inputs.asked(args)}
            document = {"environment": surroundings, "input": given[0].describe(), "options": asked, "results": results}
            writing.write_json(args.json, document)
        if args.plot and given:
            plot(results, given[0], args.plot)

    patiently(comm, write_files)
    return 0 if all(result["ok"] for result in results) else 1


def load(args: argparse.Namespace) -> tuple[Inputs, Positions | None]:
    """Return the input, and the queries to check: None for all, a sample where the whole is too large.

    The gradient of the output is zero at the other queries, so that the oracle's gradients are exact.
    """
    if args.iterations < 1:
        raise ValueError("--iterations is at least 1")
    writing.check(args.json, args.trace)
    if args.plot:
        charts.check(args.plot)
    given = inputs.load(args)
    batch, heads, tokens, _ = given.q.shape
    checked = max(ORACLE_SCORES // max(batch * heads * given.k.shape[2], 1), 1)
    if checked >= tokens:
        return given, None
    queries = np.sort(np.random.default_rng(inputs.seed(args)).choice(tokens, checked, replace=False))
    given.d_out[:, :, np.setdiff1d(np.arange(tokens), queries)] = 0
    return given, queries


def build(
    args: argparse.Namespace, comm: Communicator, stack: ExitStack, given: Inputs | None
) -> tuple[list[Trial], list[str]]:
    """Build each algorithm that is asked for, in each of its variants that fit and each layout.

    "auto" is one trial: what the planner chooses for the input, which rank 0 has.

    Returns the trials and, where all algorithms are asked for, what was left out and why.
    """
    asked, left_out = chosen.expand(args, comm.Get_size())
    trials: list[Trial] = []
    for name, arguments in asked:
        if name == AUTO:
            choice = inputs.choose(comm, given, args, backward=True)
            options = {"layout": args.layout, **inputs.options(args), **gpu.options(args)}
            attention = stack.enter_context(choice.attention(TracedComm(comm), **options))
            best, traced = choice.plan.best.candidate.algorithm, attention.comm
            assert isinstance(traced, TracedComm)
            trials.append(Trial(best, choice.arguments, traced, attention, why=choice.explain()))
            continue
        for layout in [args.layout] if args.layout else LAYOUTS:
            traced = TracedComm(comm)
            try:
                options = {"layout": layout, **inputs.options(args), **gpu.options(args)}
                attention = ALGORITHMS[name](traced, **options, **arguments)
            except InputError as error:
                if args.algorithms != chosen.ALL:
                    raise
                left_out.append(f"{name}: {error}")
                break
            trial = Trial(name, arguments, traced, stack.enter_context(attention))
            if (trial.name, attention.layout) not in [(other.name, other.attention.layout) for other in trials]:
                trials.append(trial)  # else the layout makes no difference to it
    if not trials:
        raise InputError("; ".join(dict.fromkeys(reason.partition(": ")[2] for reason in left_out)))
    return trials, left_out


def expected(given: Inputs, queries: Positions | None, args: argparse.Namespace) -> list[Right]:
    """Return the oracle's out and d_q at the checked queries, d_k and d_v, and what errors are relative to at least."""
    q, k, v = given.q, given.k, given.v
    d_out = given.d_out if queries is None else given.d_out[:, :, queries]
    features = {"softcap": args.softcap, **inputs.features(args, q.shape[1])}
    least = cancelling({"q": q, "k": k, "v": v, "out": d_out}, args.scale, args.dropout or 0, 1 / 256)
    with np.errstate(all="ignore"):  # the input may have infinite numbers
        out, _ = oracle.attention(q, k, v, args.mask, args.scale, queries, **features)
        gradients = oracle.gradients(q, k, v, d_out, args.mask, args.scale, queries, **features)
    return [(right, least.get(name, 0)) for name, right in zip(RESULTS, (out, *gradients), strict=True)]
