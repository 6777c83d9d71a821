"""`mpiattn bench train`: tokens a second in training by each algorithm, beside what virtual ranks predict."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ... import machines
from ...algorithms import ALGORITHMS
from ...algorithms.spelling import spell
from ...errors import InputError
from ...machines import writing
from ...machines.machine import Machine
from ...messages.message import Communicator
from ...models.plan import Plan
from ...planner.units import count
from .. import chosen, terminal
from ..env.environment import environment
from ..progress import bar
from ..root import on_root, patiently
from .train_step import TrainStep, predict

DESCRIPTION = """\
Measure the training steps of mpiattn train (forward, backward, sum of the gradients, AdamW) on all ranks, a
sequence spread over all of them, with random weights and random tokens. The algorithms take turns; medians of

  s a step         of the slowest rank
  tokens/s a rank  the tokens of a step, by its seconds and the number of ranks
  waiting          share of a step in which a rank waits for messages, the mean of the ranks
  predicted        with --machine: tokens/s a rank, of two times that are added up,
                   - messages and attention's blocks: the same step in virtual time, on as many ranks of the machine
                   - the rest of a step: that of "alone", without its blocks

"alone" takes its turn, too: all ranks at once train, each for itself, on a sequence as long as its share of the
whole one, and send nothing.
"""

EXAMPLES = """\
example:
  mpiexec -n 4 mpiattn calibrate --output here.toml
  mpiexec -n 4 mpiattn bench train --machine here.toml
"""

SIZES = {"tokens": 1024, "batch": 1, "layers": 2, "d_model": 128, "heads": 4, "kv_heads": None, "seed": 0}
"""Options that a config stands for, and what they are where neither is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn bench train`."""
    parser.add_argument(
        "--algorithms", type=partial(chosen.several, among=tuple(ALGORITHMS)), default="ring,mesh,ulysses",
        metavar="NAME,...", help=f"of those that share out tokens (default ring,mesh,ulysses); {chosen.SPELLING}",
    )  # fmt: skip
    text = "of mpiattn train, instead of sizes and seed; its steps and held_out do not count"
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)
    parser.add_argument("--tokens", type=count, metavar="N", help="of a sequence, all ranks together (default 1024)")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences a step (default 1)")
    parser.add_argument("--layers", type=int, metavar="N", help="default 2")
    parser.add_argument("--d-model", type=int, metavar="N", help="features of a token (default 128)")
    parser.add_argument("--heads", type=int, metavar="N", help="default 4")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="default as many as query heads")
    parser.add_argument("--seed", type=int, metavar="N", help="of weights and tokens (default 0)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="default 5, after one that is not timed")
    names = ", ".join(machines.presets())
    parser.add_argument("--machine", metavar="NAME", help=f"predict for it: a file of mpiattn calibrate, or {names}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step, with the environment")


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure, predict where there is a machine, and print on rank 0."""
    plan, machine = comm.bcast(on_root(comm, lambda: given(args)))
    asked = [chosen.on_grid(one, args, comm.Get_size()) for one in args.algorithms]
    surroundings = environment(comm)
    one_rank = comm.Split(comm.Get_rank())
    part = dataclasses.replace(plan, tokens=math.ceil(plan.tokens / comm.Get_size()))
    alone = TrainStep("alone", comm, one_rank, part, ("ring", {}))
    steps = [*(TrainStep(spell(*one), comm, comm, plan, one) for one in asked), alone]
    progress = bar(comm, len(steps) * (args.steps + 1) + (len(asked) if machine else 0), "step")
    for number in range(args.steps + 1):
        for step in steps:
            progress.set_postfix_str(step.name)
            step.measure(keep=number > 0)
            progress.update()
    results = [step.results() for step in steps]
    for one, result in zip(asked if machine else [], results, strict=False):
        progress.set_postfix_str(f"{result['name']} in virtual time")
        virtual = comm.bcast(patiently(comm, partial(predict, machine, comm.Get_size(), plan, one)))
        seconds = virtual + statistics.median(alone.others)
        result |= {"virtual": virtual, "predicted": plan.batch * plan.tokens / comm.Get_size() / seconds}
        progress.update()
    progress.close()
    for step in steps:
        step.trainer.free()
    one_rank.Free()
    if comm.Get_rank() == 0:
        print(description(plan, comm.Get_size(), args.steps), table(results), sep="\n")
        if machine:
            rest = statistics.median(alone.others)
            print(f"predicted: messages and blocks in virtual time on {machine.name}, {rest:.3g} s for the rest")
    if args.json:
        document = {"command": " ".join(["mpiattn", *sys.argv[1:]]), "environment": surroundings, **plan.to_tables()}
        document |= {"machine": args.machine, "results": results}
        on_root(comm, lambda: writing.write_json(args.json, document))
    return 0


def given(args: argparse.Namespace) -> tuple[Plan, Machine | None]:
    """Return the plan and the machine that the command line asks for, once --json can be written."""
    if args.steps < 1:
        raise InputError(f"--steps {args.steps}: at least 1")
    writing.check(args.json)
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if args.config and sizes:
        raise InputError(f"--config and --{next(iter(sizes)).replace('_', '-')} exclude each other")
    plan = Plan.from_toml(args.config) if args.config else of_sizes(**{**SIZES, **sizes})
    machine = machines.load(args.machine) if args.machine else None
    if machine is not None:
        machine.rates(plan.dtype)
    return dataclasses.replace(plan, held_out=0.0), machine


def of_sizes(tokens: int, batch: int, layers: int, d_model: int, heads: int, kv_heads: int | None, seed: int) -> Plan:
    """Return the plan of a Llama of these sizes; between its two matrices an MLP is 8/3 as wide."""
    kv_heads = heads if kv_heads is None else kv_heads
    if min(batch, layers, d_model, heads, kv_heads) < 1 or seed < 0:
        raise InputError("--batch, --layers, --d-model, --heads and --kv-heads are at least 1, --seed is 0 or more")
    if d_model % (2 * heads):
        raise InputError(f"--d-model {d_model} must be a multiple of 2 x --heads {heads}: rotary embeddings turn pairs")
    if heads % kv_heads:
        raise InputError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}")
    model = {"hidden_size": d_model, "intermediate_size": 8 * d_model // 3, "num_hidden_layers": layers}
    model |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return Plan.from_tables({"model": model, "training": {"tokens": tokens, "batch": batch, "seed": seed}})


def description(plan: Plan, ranks: int, steps: int) -> str:
    """Return in a line what was trained."""
    model, weights = plan.model, sum(math.prod(shape) for shape in plan.model.shapes.values())
    return (
        f"ranks {ranks}, tokens a step {plan.batch} x {plan.tokens}, layers {model.num_hidden_layers}, "
        f"features {model.hidden_size}, heads {model.num_attention_heads} (of K and V {model.num_key_value_heads}), "
        f"{weights / 1e6:.2g} million weights, {plan.dtype}; medians of {steps} steps"
    )


def table(results: list[dict[str, Any]]) -> str:
    """Return the medians as a table."""
    predicted = "predicted" in results[0]
    headers = ["", "s a step", "tokens/s\na rank", "waiting", *(["predicted", "measured /\npredicted"] * predicted)]
    rows = []
    for one in results:
        row = [one["name"], f"{statistics.median(one['seconds']):.3g}", f"{one['rate']:.4g}"]
        row.append(f"{statistics.median(one['waiting']):.0%}")
        rate = one.get("predicted")
        rows.append([*row, *([f"{rate:.4g}", f"{one['rate'] / rate:.2f}"] if rate else ["", ""] * predicted)])
    return terminal.table(rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))
