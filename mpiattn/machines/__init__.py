"""Descriptions of machines in TOML: those that come along here, and how one is read and written.

Each preset says where its numbers come from; `mpiattn calibrate` measures the machine at hand.
"""

from __future__ import annotations

import functools
import math
from importlib import resources
from pathlib import Path

from ..errors import InputError
from .machine import LEVELS, Link, Machine, Rates
from .table import Table
from .writing import write_text


def presets() -> list[str]:
    """Return the names of the descriptions that come along."""
    entries = resources.files(__package__).iterdir()
    return sorted(entry.name[:-5] for entry in entries if entry.name.endswith(".toml"))


@functools.cache
def load(name: str) -> Machine:
    """Return a machine from the name of a preset or the path of a TOML file.

    Raises
    ------
    InputError
        Where there is none, or the file is damaged: names line and key.
    """
    if name in presets():
        text = (resources.files(__package__) / f"{name}.toml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8", errors="replace")
    else:
        raise InputError(f"no machine {name!r}: give the path of a TOML file, or one of {', '.join(presets())}")
    return parse(text, name)


def parse(text: str, where: str = "machine") -> Machine:
    """Return the machine that a TOML text describes; see `load` for errors."""
    top = Table.parse(text, where)
    links = _links(top.table("links"))
    compute = _compute(top.table("compute"))
    if not compute:
        raise top.wrong("compute", "has no dtype, such as [compute.float32]")
    top.values.setdefault("name", where)
    machine = Machine(links=links, compute=compute, **top.fields(Machine))
    if ("rack" in links) != (machine.nodes_per_rack > 0):
        raise top.wrong("nodes_per_rack", "belongs to [links.rack], and the other way round")
    top.end()
    return machine


def _links(tables: Table) -> dict[str, Link]:
    links = {}
    for level in LEVELS:
        if level == "network" or level in tables.values:
            table = tables.table(level)
            links[level] = Link(**table.fields(Link))
            table.end()
    tables.end()
    return links


def _compute(tables: Table) -> dict[str, Rates]:
    compute = {}
    for dtype in list(tables.values):
        table = tables.table(dtype)
        tokens, forward, backward = (table.numbers(key) for key in ("tokens", "forward", "backward"))
        for key, column in (("forward", forward), ("backward", backward)):
            if len(column) != len(tokens):
                raise table.wrong(key, f"must have {len(tokens)} numbers, as many as tokens")
        if list(tokens) != sorted(set(tokens)):
            raise table.wrong("tokens", "must ascend")
        compute[dtype] = Rates(tuple(map(int, tokens)), forward, backward, **table.fields(Rates))
        table.end()
    return compute


def write(machine: Machine, path: Path) -> None:
    """Write a machine description that `load` reads."""
    lines = [f'name = "{machine.name}"', f'source = "{machine.source}"']
    whole = "ranks_per_node", "ranks_per_device", "nodes_per_rack"
    for key in (*whole, "memory", "memory_bandwidth", "launch", "overhead"):
        lines.append(f"{key} = {getattr(machine, key):.6g}")
    lines.append(f"eager = {machine.eager}")
    lines += [f"{key} = {str(getattr(machine, key)).lower()}" for key in ("progress", "duplex")]
    for level, link in machine.links.items():
        lines += ["", f"[links.{level}]", f"latency = {link.latency:.6g}", f"bandwidth = {link.bandwidth:.6g}"]
        lines += [f"shared = {link.shared:.6g}"] if math.isfinite(link.shared) else []
        lines += [f"cards = {link.cards}"] if link.cards else []
    for dtype, rates in machine.compute.items():
        lines += ["", f"[compute.{dtype}]", f"call = {rates.call:.6g}", f"tokens = {list(rates.tokens)}"]
        for key in ("forward", "backward"):
            lines.append(f"{key} = [{', '.join(f'{rate:.6g}' for rate in getattr(rates, key))}]")
    write_text(path, "\n".join(lines) + "\n")
