"""Machine descriptions: what `virtual` needs to know of a cluster, read from a small TOML file.

A description gives times, not names of products: how long a message takes between two ranks of a node or of
two nodes, how many network cards a node's ranks share, how fast the kernel is. The presets under
`mpiattn/machines/` each say where their numbers come from; `mpiattn calibrate` measures such a file.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .message import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LEVELS = ("device", "node", "rack", "network")
"""Two ranks on one device, on one node, in one rack, anywhere: the nearest level that a file has counts."""


@dataclass(frozen=True)
class Link:
    """What connects two ranks of one level.

    Attributes
    ----------
    latency : float
        Seconds from the start of a message to its first byte.
    bandwidth : float
        Bytes per second of one port, each way: a rank's own port, or a network card where `cards` is given.
    shared : float
        Bytes per second of all the messages of one node over links of this level together; inf: no limit.
    cards : int
        Network cards of a node, which its ranks share evenly; 0: each rank has a port of its own.
    """

    latency: float
    bandwidth: float
    shared: float = math.inf
    cards: int = 0


def operations(head_dim: int, v_head_dim: int, backward: bool) -> int:
    """Return the floating-point operations of a pair of a query and a key, for one head.

    Forward two matrix products: the scores, and out. Backward five: the scores again, dP, dV, dQ, dK.
    """
    return 2 * (3 * head_dim + 2 * v_head_dim) if backward else 2 * (head_dim + v_head_dim)


@dataclass(frozen=True)
class Rates:
    """Speed of the kernel for one dtype, by the size of a block.

    Attributes
    ----------
    tokens : tuple of int
        Block sizes, ascending: the square root of queries times keys.
    forward, backward : tuple of float
        Floating-point operations per second at these sizes.
    call : float
        Seconds that each call costs whatever its size.
    """

    tokens: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    call: float = 0.0

    def at(self, tokens: float, backward: bool) -> float:
        """Return the rate for a block size, interpolated between logarithms, constant outside."""
        rates = self.backward if backward else self.forward
        place = bisect.bisect(self.tokens, tokens)
        if place == 0 or place == len(self.tokens):
            return rates[min(place, len(rates) - 1)]
        low, high = self.tokens[place - 1 : place + 1]
        weight = math.log(tokens / low) / math.log(high / low)
        return float(rates[place - 1] ** (1 - weight) * rates[place] ** weight)


@dataclass(frozen=True)
class Machine:
    """A cluster, as far as time is concerned; see the presets for an example with comments.

    Attributes
    ----------
    name : str
    ranks_per_node, ranks_per_device : int
    nodes_per_rack : int
        0 where the description has no racks.
    memory : float
        Bytes that one rank may use.
    memory_bandwidth : float
        Bytes per second, read and written together, of copies, sums and merges.
    launch : float
        Seconds that each copy, sum or merge takes at least, however small: what it costs to start it.
    overhead : float
        Seconds of the rank's own time for each message that it posts.
    eager : int
        Messages of fewer bytes leave before their receive is posted.
    progress : bool
        Whether messages travel while a rank computes; otherwise only while it waits.
    duplex : bool
        Whether a port sends and receives at once at full speed.
    links : by level
    compute : Rates, by the dtype's name
    """

    name: str
    ranks_per_node: int
    memory: float
    memory_bandwidth: float
    links: Mapping[str, Link]
    compute: Mapping[str, Rates]
    ranks_per_device: int = 1
    nodes_per_rack: int = 0
    launch: float = 0.0
    overhead: float = 0.0
    eager: int = 0
    progress: bool = True
    duplex: bool = True
    source: str = field(default="", compare=False)

    def level(self, one: int, other: int) -> str:
        """Return the nearest level on which two ranks are connected."""
        apart = {"device": self.ranks_per_device, "node": self.ranks_per_node}
        apart["rack"] = self.ranks_per_node * self.nodes_per_rack
        for level in LEVELS[:3]:
            if level in self.links and one // apart[level] == other // apart[level]:
                return level
        return "network"

    def seconds(self, dtype: str, flops: float, tokens: float, backward: bool) -> float:
        """Return the time of one call of the kernel."""
        rates = self.rates(dtype)
        return rates.call + flops / rates.at(tokens, backward)

    def rates(self, dtype: str) -> Rates:
        """Return the kernel's rates for a dtype, or raise InputError with the dtypes there are."""
        if dtype not in self.compute:
            raise InputError(f"machine {self.name} has no rates for {dtype}, only for {', '.join(self.compute)}")
        return self.compute[dtype]


def presets() -> list[str]:
    """Return the names of the machine descriptions that come along."""
    folder = resources.files(__package__) / "machines"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


@functools.cache
def load(name: str) -> Machine:
    """Return a machine from the name of a preset or the path of a TOML file.

    Raises
    ------
    InputError
        Where there is none, or the file is damaged: names line and key.
    """
    if name in presets():
        text = (resources.files(__package__) / "machines" / f"{name}.toml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8", errors="replace")
    else:
        raise InputError(f"no machine {name!r}: give the path of a TOML file, or one of {', '.join(presets())}")
    return parse(text, name)


@dataclass
class _Table:
    """A table of a TOML file, of which keys are taken one by one, so that none is left unread."""

    values: dict[str, Any]
    text: str
    where: str
    section: str = ""

    def wrong(self, key: str, what: str) -> InputError:
        """Return an error that names file, line and key."""
        section, line = "", 0
        for number, content in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[\s*([^\]]*?)\s*\]", content):
                section = header[1]
            if re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", content) and section == self.section:
                return InputError(f"{self.where}, line {number}: {self._name(key)} {what}")
            if section == self.section and not line:
                line = number
        return InputError(f"{self.where}, line {line or 1}: {self._name(key)} {what}")

    def _name(self, key: str) -> str:
        return f"{self.section}.{key}" if self.section else key

    def table(self, key: str) -> _Table:
        """Take a table."""
        value = self.values.pop(key, None)
        section = self._name(key)
        if not isinstance(value, dict):
            raise self.wrong(key, f"must be a table, [{section}]")
        return _Table(value, self.text, self.where, section)

    def number(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """Take a positive number; zero where allowed."""
        if key not in self.values and default is not None:
            return default
        value = self.values.pop(key, None)
        if value is None:
            raise self.wrong(key, "is missing")
        return self._positive(key, value, zero)

    def _positive(self, key: str, value: object, zero: bool) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, f"must be a number, not {value!r}")
        if not math.isfinite(value):
            raise self.wrong(key, f"must be a finite number, not {value!r}")
        if value < 0 or (value == 0 and not zero):
            raise self.wrong(key, f"must be {'zero or more' if zero else 'more than zero'}, not {value!r}")
        return float(value)

    def integer(self, key: str, default: int | None = None, zero: bool = False) -> int:
        """Take a whole number."""
        value = self.number(key, default, zero)
        if value != int(value):
            raise self.wrong(key, f"must be a whole number, not {value!r}")
        return int(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Take true or false."""
        value = self.values.pop(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, f"must be true or false, not {value!r}")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """Take a list of positive numbers."""
        value = self.values.pop(key, None)
        if not isinstance(value, list) or not value:
            raise self.wrong(key, "must be a list of numbers")
        return tuple(self._positive(key, entry, False) for entry in value)

    def text_of(self, key: str, default: str) -> str:
        """Take a text."""
        value = self.values.pop(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, f"must be a text, not {value!r}")
        return value

    def end(self) -> None:
        """Refuse what nobody took: a misspelt key would pass for its default."""
        for key in self.values:
            raise self.wrong(key, "is not a key of a machine description")


def parse(text: str, where: str = "machine") -> Machine:
    """Return the machine that a TOML text describes; see `load` for errors."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: {error}") from None
    top = _Table(values, text, where)
    links, levels = {}, top.table("links")
    for level in LEVELS:
        if level == "network" or level in levels.values:
            link = levels.table(level)
            links[level] = Link(
                link.number("latency", zero=True),
                link.number("bandwidth"),
                link.number("shared", math.inf),
                link.integer("cards", 0, zero=True),
            )
            link.end()
    levels.end()
    compute = {}
    kernels = top.table("compute")
    for dtype in list(kernels.values):
        rates = kernels.table(dtype)
        columns = [rates.numbers(key) for key in ("tokens", "forward", "backward")]
        for key, column in zip(("forward", "backward"), columns[1:], strict=True):
            if len(column) != len(columns[0]):
                raise rates.wrong(key, f"must have {len(columns[0])} numbers, as many as tokens")
        if list(columns[0]) != sorted(set(columns[0])):
            raise rates.wrong("tokens", "must ascend")
        tokens = tuple(map(int, columns[0]))
        compute[dtype] = Rates(tokens, columns[1], columns[2], rates.number("call", 0.0, zero=True))
        rates.end()
    if not compute:
        raise top.wrong("compute", "has no dtype, such as [compute.float32]")
    machine = Machine(
        name=top.text_of("name", where),
        ranks_per_node=top.integer("ranks_per_node"),
        memory=top.number("memory"),
        memory_bandwidth=top.number("memory_bandwidth"),
        links=links,
        compute=compute,
        ranks_per_device=top.integer("ranks_per_device", 1),
        nodes_per_rack=top.integer("nodes_per_rack", 0, zero=True),
        launch=top.number("launch", 0.0, zero=True),
        overhead=top.number("overhead", 0.0, zero=True),
        eager=top.integer("eager", 0, zero=True),
        progress=top.boolean("progress", True),
        duplex=top.boolean("duplex", True),
        source=top.text_of("source", ""),
    )
    if ("rack" in links) != (machine.nodes_per_rack > 0):
        raise top.wrong("nodes_per_rack", "belongs to [links.rack], and the other way round")
    top.end()
    return machine


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
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
