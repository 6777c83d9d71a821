"""Contenders of `mpiattn bench torch`: what each of them is, and what was measured of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ...algorithms import Attention
from ...algorithms.spelling import Asked, spell
from ...messages.message import Communicator
from .. import terminal
from .torch_parallel import ROTATIONS
from .torch_shares import Share, algorithm, context_parallel


@dataclass
class Contender:
    """A way to share out the tokens of a step, and what was measured of it.

    Attributes
    ----------
    name : str
    share : function
        Returns the context in which it does so.
    rounds : list of dict
        Seconds of a step, of its passes (forward and backward), of these without attention's messages (quiet; 0 where
        it is not known) and of the sum of the gradients, on the slowest rank; nbytes in use on the fullest GPU; loss.
    failed : str
        Why it was given up.
    """

    name: str
    share: Callable[[], AbstractContextManager[Share]]
    rounds: list[dict[str, float]] = field(default_factory=list)
    failed: str = ""

    def column(self, name: str) -> list[float]:
        """Return what was measured of one kind."""
        return [one[name] for one in self.rounds]

    @property
    def waiting(self) -> list[float]:
        """Shares of a step that its passes take longer than without attention's messages, where that is known."""
        return [max(one["passes"] - one["quiet"], 0) / one["seconds"] for one in self.rounds if one["quiet"]]

    @property
    def summing(self) -> list[float]:
        """Shares of a step in which the gradients are summed."""
        return [one["gradients"] / one["seconds"] for one in self.rounds]

    @property
    def result(self) -> dict[str, object]:
        """The measurements, to be written down."""
        return {"name": self.name, "failed": self.failed, "rounds": self.rounds}


def contenders(
    comm: Communicator, model: nn.Module, tokens: int, device: torch.device, asked: Sequence[Asked],
    build: Callable[[Asked], Attention], with_torch: bool,
) -> list[Contender]:  # fmt: skip
    """Return the algorithms, which `build` builds, and torch's context parallelism; on one rank, torch's attention."""
    common = comm, model, tokens, device
    found = [Contender(spell(*one), partial(algorithm, *common, partial(build, one))) for one in asked]
    for rotation in ROTATIONS[: comm.Get_size()] if with_torch else ():
        name = f"torch context_parallel, {rotation}" if comm.Get_size() > 1 else "torch"
        found.append(Contender(name, partial(context_parallel, *common, rotation)))
    return found


def table(contenders: list[Contender], tokens: float) -> str:
    """Return the medians as a table, of a number of tokens a rank."""
    parallel = [one for one in contenders if one.name.startswith("torch") and not one.failed]
    best = min(parallel, key=lambda one: statistics.median(one.column("seconds")), default=None)
    headers = ["", "s a step", "tokens/s\na rank", "waiting", "gradients", "x torch", "GiB\na GPU", "loss"]
    rows = []
    for one in contenders:
        if one.failed:
            rows.append([one.name, "out of memory", *[""] * 6])
            continue
        seconds = statistics.median(one.column("seconds"))
        row = [one.name, f"{seconds:.3g}", f"{tokens / seconds:.4g}"]
        row += [f"{statistics.median(share):.0%}" if share else "" for share in (one.waiting, one.summing)]
        times = zip(best.column("seconds"), one.column("seconds"), strict=True) if best else ()
        row.append(f"{statistics.median(a / b for a, b in times):.3f}" if best else "")
        nbytes = statistics.median(one.column("nbytes"))
        rows.append([*row, f"{nbytes / 2**30:.1f}" if nbytes else "", f"{one.column('loss')[-1]:.5f}"])
    kept = [column for column in range(len(headers)) if any(row[column] for row in rows)]
    rows, headers = [[row[column] for column in kept] for row in rows], [headers[column] for column in kept]
    align = ("left", *["right"] * (len(headers) - 1))
    text = terminal.table(rows, headers, ("loss",), disable_numparse=True, colalign=align)
    return "\n".join([text, *(f"{one.name}: {one.failed}" for one in contenders if one.failed)])
