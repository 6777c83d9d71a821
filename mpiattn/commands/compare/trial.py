"""An algorithm that is built and run on a share of the input, and what is measured of it."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from ...algorithms import Attention
from ...algorithms.shares import gather
from ...algorithms.spelling import spell
from ...arrays import Array
from ...arrays.operations import of, on_host
from ...conformance import oracle
from ...costs.peak import peak
from ...messages.message import clock
from ...problems.mask import Positions
from ...trace import owners
from ...trace.comm import TracedComm
from ...trace.events import Trace
from .. import gpu, inputs
from ..chosen import AUTO
from ..inputs import Inputs
from .held import held

PASSES = ("forward", "backward")

RESULTS = ("out", "d_q", "d_k", "d_v")

Right = tuple[Array, float]
"""A result as expected, and the least that its errors are relative to."""


@dataclass
class Trial:
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
    xp: ModuleType = np
    why: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The algorithm, and whether it was chosen."""
        return f"{AUTO}: {self.algorithm}" if self.why else self.algorithm

    @property
    def name(self) -> str:
        """The algorithm and its arguments, as every command takes them, and whether it was chosen."""
        return f"{AUTO}: " * bool(self.why) + spell(self.algorithm, self.arguments)

    @property
    def grid(self) -> str:
        """Name of one of the variants of an algorithm, such as 2x3; else the number of ranks."""
        return "x".join(map(str, self.arguments.values())) or str(self.comm.Get_size())

    def share(self, given: Inputs | None, args: argparse.Namespace, xp: ModuleType) -> None:
        """Receive this rank's share of the input, as arrays of a namespace."""
        self.xp = xp
        self.shapes, self.inputs, self.features = inputs.share(given, self.comm.comm, self.attention, args, xp)

    def check(self, queries: Positions | None, right: Sequence[Right] | None) -> None:
        """Run once; keep the errors against the oracle (on rank 0), the peak memory, and what was received."""
        comm, trace, (*qkv, d_out) = self.comm.comm, self.comm.trace, self.inputs
        with held(self.xp, trace) as most_held:
            out, saved = self.attention.forward(*qkv, **self.features)
            self.received["forward"] = trace.received()
            trace.clear()
            gradients = self.attention.backward(d_out, saved)
            self.received["backward"] = trace.received()
            trace.clear()
        self.peak = most_held.bytes
        queued = of(self.xp).QUEUED
        most = peak(self.algorithm, saved.problem, comm.Get_rank(), queued, **self.arguments)
        self.formula = max(most.forward, most.backward)
        for name, array, reference in zip(RESULTS, (out, *gradients), right or itertools.repeat(None), strict=False):
            name = name.removeprefix("d_")
            where, copies = self.attention.owned(name, self.shapes), name in self.attention.copied
            whole = gather(on_host(array), comm, where, shape=self.shapes[name], copies=copies)
            if whole is not None and reference is not None:
                rows = whole if queries is None or name in "kv" else whole[:, :, queries]
                self.errors.append(oracle.error(rows, *reference))

    def measure(self, kept: Trace | None) -> None:
        """Run once more; keep the time and the time spent in waits, forward and backward, and the events if asked."""
        (*qkv, d_out), saved, trace = self.inputs, None, self.comm.trace
        for name in PASSES:
            self.comm.comm.Barrier()
            start = clock()
            with trace.phase(f"{self.name} {self.attention.layout} {name}"):
                if saved is None:
                    _, saved = self.attention.forward(*qkv, **self.features)
                else:
                    self.attention.backward(d_out, saved)
                gpu.wait(self.xp)
            self.seconds[name].append(clock() - start)
            self.waits[name].append(trace.waited())
            if kept is not None:
                assert saved is not None
                owners.name_blocks(trace, saved.problem)
                kept.events += trace.events
            trace.clear()
