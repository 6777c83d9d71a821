"""Volume, messages, communication to compute and memory of full attention, tensor parallel, ring, mesh."""

from __future__ import annotations

import argparse

from ... import machines
from ...costs import COSTS
from ...planner import Candidate, Task
from ...problems import grid
from ...problems.mask import Full
from .report import Report
from .setting import GB, HEADS, HIDDEN, RING, outcome

FORMULAS = [
    ("full attention", "0 (one device)", "0", "0", "4 P; and n² scores, if they are materialised"),
    ("tensor parallel", "2 (P-1): the all-reduce after the output projection", "2 (P-1)", "(P-1) / (2 n)",
     "P + 3: every device holds all tokens"),
    ("ring", "2 (P-1)", "P-1", "(P-1) / (2 n)",
     "8 + c: Q, K, V, out; 2 buffers of K/V; the sum of O"),
    ("mesh a x b", "(a-1) (1+c) + (b-1) 2", "2 (a-1) + (b-1)", "(√P-1) (3+c) / (4 n) at a = b",
     "4 + a (1+c) + 2 b + 2 c: Q, K, V, out; a Q and a O, b K/V; 2 O that arrive"),
]  # fmt: skip
HEADERS = ("method", "volume a device, in n d / P", "messages a device", "elements / operations",
           "memory a device, in n d / P")  # fmt: skip
CASES = ((32768, 16), (131072, 64), (1048576, 256))


def make(args: argparse.Namespace) -> Report:
    """Compare with the article's sections 2.1, 3.1 and 3.3, whose formulas are lost."""
    report = Report(args.output, "complexity", "Complexity (article, sections 3.1 and 3.3)", args.called)
    report.note(
        "The article's formulas are lost. Below, for one forward pass without a mask: n tokens, width d, P devices, a "
        "mesh of a columns and b rows (a b = P), all in elements received or held by one device; 4 n² d / P operations "
        "a device in all four. c is the bytes of a partial output over those of an input (2 for bfloat16 with float32 "
        "sums). Rows of log-sum-exps, one number for a head and a query, are left out in the formulas."
    )
    report.table(FORMULAS, HEADERS, "formulas")
    for tokens, ranks in CASES:
        report.note(f"{tokens} tokens, {ranks} devices, width {HIDDEN}, bfloat16, partial sums in float32:")
        headers = ("method", "volume (GB)", "messages", "bytes per 10^6 operations", "memory by the formula (GB)",
                   "memory, run (GB)")  # fmt: skip
        report.table(numbers(tokens, ranks), headers, f"{tokens} on {ranks}")
    report.note(
        "Volume, messages and the last column of ring and mesh are what the code really sends and allocates, with "
        "every array counted; tensor parallel counts the all-reduce of its output projection.",
        "Where it differs from the article: section 1.2 gives the ring O(devices x tokens); that is the volume of all "
        "devices together, 2 (P-1) n d, and that of one hardly grows with P. Section 2.1.2 gives the mesh O(n/√P d) an "
        "iteration against the ring's O(n/P d) without the number of iterations, so that the ring seems to send less; "
        "per pass the ring moves about 2 n d and the mesh, at c = 1, about 4 n d / √P. Section 3.3 says that ring and "
        "mesh need the same memory: the mesh keeps a chunks of Q and O and b of K/V at once, so its memory in chunks "
        "grows with √P where the ring's stays.",
    )
    return report


def numbers(tokens: int, ranks: int) -> list[tuple[object, ...]]:
    """Return the rows of one case."""
    task = Task(tokens, HEADS, HEADS, HIDDEN // HEADS, mask=Full(), backward=False)
    rows, cols = grid.squarest(ranks)
    chunk, work = tokens * HIDDEN / ranks * 2, 4 * tokens**2 * HIDDEN / ranks  # bytes, operations
    reduced = int(2 * (ranks - 1) * chunk)
    result: list[tuple[object, ...]] = [
        ("full attention", "0", 0, "0", f"{4 * ranks * chunk / GB:.4g}", "-"),
        ("tensor parallel", f"{reduced / GB:.4g}", 2 * (ranks - 1), f"{reduced / work * 1e6:.3g}",
         f"{(ranks + 3) * chunk / GB:.4g}", "-"),
    ]  # fmt: skip
    mesh = Candidate("mesh", (("rows", rows), ("cols", cols)))
    chunks = {RING: 8 + 2, mesh: 4 + 3 * cols + 2 * rows + 2 * 2}
    for name, candidate in (("ring", RING), (f"mesh {cols} x {rows}", mesh)):
        cost = COSTS[candidate.algorithm](task.problem(ranks), 0, **dict(candidate.arguments)).forward
        peak = outcome(task, machines.load("h200-ib"), ranks, candidate).peak
        result.append(
            (name, f"{cost.nbytes / GB:.4g}", cost.messages, f"{cost.nbytes / work * 1e6:.3g}",
             f"{chunks[candidate] * chunk / GB:.4g}", f"{peak / GB:.4g}")
        )  # fmt: skip
    return result
