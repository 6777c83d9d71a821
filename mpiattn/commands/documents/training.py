"""Training throughput of LLaMA-7B at 32K tokens, 4 to 64 devices."""

from __future__ import annotations

import argparse
import dataclasses

from ... import machines
from ...errors import InputError
from ...machines.machine import Machine
from .. import charts
from .claims import TRAINING
from .report import Report
from .setting import LAYERS, PARAMETERS, K, llama, ring_and_mesh

MATMUL = {"a100-ib": 178e12, "h200-ib": 450e12}
"""Operations per second of the other layers' products: 57 % of A100's peak, as Megatron-LM reports for its largest
models (arXiv 2104.04473: 52 % end to end), and 46 % of H200's, the share seen in large training runs (estimate)."""

SLOW = 2.5e9
"""Bytes per second of the links that the second table has everywhere: 20 Gb/s."""


def make(args: argparse.Namespace) -> Report:
    """Compare with the article's section 5.2."""
    found, tokens = machines.load(args.machine), args.tokens or 32 * K
    if found.name not in MATMUL:
        raise InputError(f"no rate of matrix products for {found.name}: choose from {', '.join(MATMUL)}")
    name = f"Training throughput, LLaMA-7B at {tokens // K}K tokens (article, section 5.2)"
    report = Report(args.output, "training", name, args.called)
    slow = dataclasses.replace(
        found,
        links={
            level: dataclasses.replace(link, bandwidth=min(link.bandwidth, SLOW)) for level, link in found.links.items()
        },
    )
    report.note(
        f"Thousands of tokens a second of all devices together, {found.name}; attention in virtual time, {LAYERS} "
        f"layers; the others 6 x {PARAMETERS / 1e9:g}e9 operations a token at {MATMUL[found.name] / 1e12:.0f} TFLOP/s "
        "a device; without the gradients' all-reduce, the optimiser and recomputation."
    )
    ratios = {f"ours, {found.name}": throughput(report, found, tokens, "rows")}
    report.reason(
        "Why it differs: the article's numbers are said to be per GPU, but they grow with the number of GPUs, so they "
        "must be of all together. On 4 and 8 devices, one node, NVLink hides the messages of both, and mesh and ring "
        "differ by a percent or two; the article's 1.06 and 1.17 take slower links inside a node. Across nodes the "
        "ring waits for its cards, here more than in the article: its volume a device stays, its blocks shrink. Only "
        "attention gains from the mesh; the other layers' products are the same for both."
    )
    report.note(
        f"The same with links of {SLOW / 1e9:g} GB/s (20 Gb/s) everywhere, where the ring waits inside a node, too:"
    )
    ratios[f"ours, links of {SLOW / 1e9:g} GB/s"] = throughput(report, slow, tokens, "slow network")
    [axes] = report.figure()
    claimed = {"article": [mesh / ring for ring, mesh in TRAINING.values()]}
    charts.lines(axes, list(TRAINING), ratios, claimed, {"as fast as the ring": [1.0] * len(TRAINING)}, log="x",
                 xlabel="devices", ylabel="throughput, mesh over ring",
                 title=f"LLaMA-7B, {tokens // K}K tokens")  # fmt: skip
    return report


def throughput(report: Report, machine: Machine, tokens: int, name: str) -> list[float]:
    """Add the table of one machine, and return the mesh's throughput over the ring's."""
    rows: list[tuple[object, ...]] = []
    ratios = []
    for ranks, ring, mesh in ring_and_mesh(lambda _: llama(tokens), machine, TRAINING):
        claimed = TRAINING[ranks]
        others = 6 * PARAMETERS * tokens / ranks / MATMUL[machine.name]
        steps = [LAYERS * one.seconds + others for one in (ring, mesh)]
        speeds = [tokens / step / 1e3 for step in steps]
        ratios.append(steps[0] / steps[1])
        rows.append(
            (ranks, claimed[0], f"{speeds[0]:.1f}", claimed[1], f"{speeds[1]:.1f}", f"{claimed[1] / claimed[0]:.2f}",
             f"{ratios[-1]:.2f}", f"{LAYERS * mesh.seconds / steps[1]:.0%}")
        )  # fmt: skip
    headers = ("devices", "ring: article", "ring: ours", "mesh: article", "mesh: ours", "mesh/ring: article",
               "mesh/ring: ours", "attention's share, mesh")  # fmt: skip
    report.table(rows, headers, name)
    return ratios
