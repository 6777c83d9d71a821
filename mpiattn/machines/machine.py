"""Machines: what the virtual cluster needs to know of a real one.

A description gives times, not names of products: how long a message takes between two ranks of a node or of
two nodes, how many network cards a node's ranks share, how fast the kernel is. See `machines` for some.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import InputError

LEVELS = ("device", "node", "rack", "network")
"""Two ranks on one device, on one node, in one rack, anywhere: the nearest level that has a link counts."""


@dataclass(frozen=True)
class Link:
    """Link between two ranks of one level.

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

    def per_byte(self, crossing: float = 1) -> float:
        """Return the seconds of a byte into a rank while so many ranks of its node use links of this level."""
        in_turn = max(crossing / self.cards, 1) if self.cards else 1
        return max(in_turn / self.bandwidth, crossing / self.shared)


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
