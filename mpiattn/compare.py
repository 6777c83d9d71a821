"""Run algorithms side by side on the same input, forward and backward, and check each against the oracle.

By default every algorithm, grid and layout that fits the number of ranks, with a causal mask, on real input.
Times are the slowest rank's, medians over rounds in which the algorithms take turns; waiting is time spent
in waits for messages; errors are relative to the largest value, against textbook attention in float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tracemalloc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from . import env, gpu, grid, inputs, memory, oracle
from .algorithms import ALGORITHMS, Attention
from .arrays import on_host
from .inputs import Array, Inputs
from .layout import LAYOUTS, gather, owned_heads, scatter
from .mask import Positions
from .message import Communicator, InputError, clock
from .progress import bar
from .root import on_root, patiently
from .timeline import write
from .trace import Trace, TracedComm, watch

ORACLE_SCORES = 2**28
"""Scores (heads x queries x keys) above which the oracle checks a sample of the queries."""

AUTO = "auto"
PASSES = ("forward", "backward")
RESULTS = ("out", "d_q", "d_k", "d_v")


@dataclass
class Case:
    """One algorithm, built, and what is measured of it on this rank."""

    algorithm: str
    arguments: dict[str, Any]
    comm: TracedComm
    attention: Attention
    peak: int = 0
    formula: int = 0
    errors: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})
    waits: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})
    received: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: list[Array] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    xp: Any = np
    why: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The algorithm, and whether it was chosen."""
        return f"{AUTO}: {self.algorithm}" if self.why else self.algorithm

    @property
    def grid(self) -> str:
        """What distinguishes the variants of an algorithm, such as 2x3; else the number of ranks."""
        return "x".join(map(str, self.arguments.values())) or str(self.comm.Get_size())

    def share(self, given: Inputs | None, args: argparse.Namespace, xp: Any) -> None:
        """Receive this rank's share of the input, as arrays of a namespace."""
        self.xp = xp
        comm = self.comm.comm
        wholes = {"q": given.q, "k": given.k, "v": given.v, "out": given.d_out} if given else {}
        self.shapes = comm.bcast({name: whole.shape for name, whole in wholes.items()})
        places = {name: self.attention.owned(name, self.shapes) for name in self.shapes}
        self.inputs = [xp.asarray(scatter(wholes.get(name), comm, place)) for name, place in places.items()]
        self.features = inputs.features(args, self.shapes["q"][1])
        if "sinks" in self.features:
            place = places["out"](self.shapes["out"], comm.Get_rank())
            self.features["sinks"] = xp.asarray(self.features["sinks"][owned_heads(place)])

    def check(self, queries: Positions | None, right: Sequence[Array] | None) -> None:
        """Run once; keep the errors against the oracle (on rank 0), the peak memory, and what was received."""
        comm, trace, (*qkv, d_out) = self.comm.comm, self.comm.trace, self.inputs
        tracemalloc.start()
        out, saved = self.attention.forward(*qkv, **self.features)
        self.received["forward"] = trace.received()
        trace.clear()
        gradients = self.attention.backward(d_out, saved)
        self.received["backward"] = trace.received()
        trace.clear()
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if self.xp is not np:
            pool = self.xp.get_default_memory_pool()
            self.peak = pool.total_bytes()
            pool.free_all_blocks()
        most = memory.peak(self.algorithm, saved.problem, comm.Get_rank(), **self.arguments)
        self.formula = max(most.forward, most.backward)
        for name, array, reference in zip(RESULTS, (out, *gradients), right or itertools.repeat(None), strict=False):
            name = name.removeprefix("d_")
            where, copies = self.attention.owned(name, self.shapes), name in self.attention.copied
            whole = gather(on_host(array), comm, where, shape=self.shapes[name], copies=copies)
            if whole is not None and reference is not None:
                rows = whole if queries is None or name in "kv" else whole[:, :, queries]
                self.errors.append(oracle.error(rows, reference))

    def measure(self, kept: Trace | None) -> None:
        """Run once more; keep the time and the time spent in waits, forward and backward, and the events if asked."""
        (*qkv, d_out), saved, trace = self.inputs, None, self.comm.trace
        for name in PASSES:
            self.comm.comm.Barrier()
            start = clock()
            with trace.phase(f"{self.title} {self.grid} {self.attention.layout} {name}"):
                if saved is None:
                    _, saved = self.attention.forward(*qkv, **self.features)
                else:
                    self.attention.backward(d_out, saved)
                gpu.wait(self.xp)
            self.seconds[name].append(clock() - start)
            self.waits[name].append(trace.waited())
            if kept is not None:
                kept.events += trace.events
            trace.clear()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn compare`."""
    parser.add_argument("--algorithms", default="all", metavar="NAME,...", help=f"of {', '.join(ALGORITHMS)}, or auto")
    parser.add_argument("--grid", type=grid.argument, metavar="ROWSxCOLS", help="for mesh (default: every grid)")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: every layout")
    parser.add_argument("--mask", type=inputs.mask, default="causal", help=inputs.MASK_HELP)
    parser.add_argument("--scale", type=float, help="of the scores (default 1/sqrt(head_dim))")
    parser.add_argument("--iterations", type=int, default=3, metavar="N", help="timed rounds (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and bytes (.png, .svg, .pdf)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what each rank did, for mpiattn trace")
    inputs.add_arguments(parser)
    gpu.add_arguments(parser)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Check and measure every case; print the table on rank 0. Return 1 on a mismatch."""
    xp = gpu.namespace(args, comm)
    environment = env.environment(comm)
    given = on_root(comm, lambda: load(args))
    with ExitStack() as stack:
        cases, left_out = build(args, comm, stack, given[0] if given else None)
        kept = Trace()
        if args.trace:
            for case in cases:
                watch(case.attention)
        right = patiently(comm, lambda: expected(*given, args) if given else None)
        progress = bar(comm, total=len(cases) * (1 + args.iterations), unit="run")
        for number, case in itertools.product(range(1 + args.iterations), cases):
            progress.set_postfix_str(f"{case.title} {case.grid} {case.attention.layout}", refresh=False)
            if number == 0:
                case.share(given[0] if given else None, args, xp)
                case.check(given[1] if given else None, right)
            else:
                case.measure(kept if args.trace else None)
            progress.update()
        progress.close()
        results = [report(case, comm, str(args.mask)) for case in cases]
    if args.trace:
        write(comm, kept, args.trace)
    if given:
        print_results(results, *given, args)
        for case in cases:
            if case.why:
                print(*case.why, sep="\n  ")
        print(*(f"Left out: {reason}" for reason in dict.fromkeys(left_out)), sep="\n", end="\n" if left_out else "")
        if args.json:
            document = {"environment": environment, "input": given[0].describe(), "results": results}
            args.json.write_text(json.dumps(document, indent=1) + "\n")
        if args.plot:
            plot(results, given[0], args.plot)
    return 0 if all(result["ok"] for result in results) else 1


def load(args: argparse.Namespace) -> tuple[Inputs, Positions | None]:
    """Return the input, and the queries to check: None for all, a sample where the whole is too large.

    The gradient of the output is zero at the other queries, so that the oracle's gradients are exact.
    """
    if args.iterations < 1:
        raise ValueError("--iterations is at least 1")
    for path in (args.json, args.plot, args.trace):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder")
    given = inputs.load(args)
    batch, heads, tokens, _ = given.q.shape
    checked = max(ORACLE_SCORES // max(batch * heads * given.k.shape[2], 1), 1)
    if checked >= tokens:
        return given, None
    queries = np.sort(np.random.default_rng(args.seed).choice(tokens, checked, replace=False))
    given.d_out[:, :, np.setdiff1d(np.arange(tokens), queries)] = 0
    return given, queries


def build(
    args: argparse.Namespace, comm: Communicator, stack: ExitStack, given: Inputs | None
) -> tuple[list[Case], list[str]]:
    """Build each algorithm that is asked for, in each of its variants that fit and each layout.

    "auto" is one case: what the planner chooses for the input, which rank 0 has.

    Returns the cases and, where all algorithms are asked for, what was left out and why.
    """
    names = list(ALGORITHMS) if args.algorithms == "all" else args.algorithms.split(",")
    if unknown := [name for name in names if name not in (*ALGORITHMS, AUTO)]:
        raise InputError(f"unknown algorithm {', '.join(unknown)}: choose from {', '.join(ALGORITHMS)}, {AUTO}, or all")
    if args.grid and args.grid not in grid.grids(comm.Get_size()):
        fits = ", ".join(f"{rows}x{cols}" for rows, cols in grid.grids(comm.Get_size()))
        raise InputError(f"--grid does not hold {comm.Get_size()} ranks: choose from {fits}")
    cases: list[Case] = []
    left_out = []
    for name in names:
        if name == AUTO:
            choice = inputs.choose(comm, given, args, backward=True)
            options = {"layout": args.layout, **inputs.options(args), **gpu.options(args)}
            attention = stack.enter_context(choice.attention(TracedComm(comm), **options))
            chosen = choice.plan.best.candidate.algorithm
            cases.append(Case(chosen, choice.arguments, attention.comm, attention, why=choice.explain()))
            continue
        for arguments in ALGORITHMS[name].variants(comm.Get_size()):
            if args.grid and "rows" in arguments and (arguments["rows"], arguments["cols"]) != args.grid:
                continue
            for layout in [args.layout] if args.layout else LAYOUTS:
                traced = TracedComm(comm)
                try:
                    options = {"layout": layout, **inputs.options(args), **gpu.options(args)}
                    attention = ALGORITHMS[name](traced, **options, **arguments)
                except InputError as error:
                    if args.algorithms != "all":
                        raise
                    left_out.append(f"{name}: {error}")
                    break
                case = Case(name, arguments, traced, stack.enter_context(attention))
                if (name, case.grid, attention.layout) not in [(c.title, c.grid, c.attention.layout) for c in cases]:
                    cases.append(case)  # else the layout makes no difference to it
    if not cases:
        raise InputError("; ".join(dict.fromkeys(reason.partition(": ")[2] for reason in left_out)))
    return cases, left_out


def expected(given: Inputs, queries: Positions | None, args: argparse.Namespace) -> list[Array]:
    """Return the oracle's out and d_q at the checked queries, d_k and d_v."""
    q, k, v = given.q, given.k, given.v
    d_out = given.d_out if queries is None else given.d_out[:, :, queries]
    features = {"softcap": args.softcap, **inputs.features(args, q.shape[1])}
    out, _ = oracle.attention(q, k, v, args.mask, args.scale, queries, **features)
    return [out, *oracle.gradients(q, k, v, d_out, args.mask, args.scale, queries, **features)]


def report(case: Case, comm: Communicator, mask: str) -> dict[str, Any]:
    """Return a case's results with what all ranks measured, the same on every rank."""
    ranks = comm.allgather((case.seconds, case.waits, case.received, case.peak, case.formula))
    seconds, waits, received, peaks, formulas = zip(*ranks, strict=True)
    errors = comm.bcast(case.errors)
    tolerance = oracle.TOLERANCES[case.attention.problem.dtype.name] if case.attention.problem else 0
    result: dict[str, Any] = {
        "algorithm": case.title,
        "grid": case.grid,
        "layout": case.attention.layout,
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
    """Draw time and bytes of each case as two rows of bars."""
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
        for name, colour in zip(PASSES, ("#0072b2", "#e69f00"), strict=True):
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
    figure.savefig(path, dpi=150)
