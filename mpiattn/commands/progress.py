"""Progress on rank 0: a bar where a person watches, else a line for each thing that is begun."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from ..messages.message import Communicator
from . import terminal


def bar(comm: Communicator | None, total: int | None, unit: str) -> Any:
    """Return tqdm's bar on rank 0 of a job on a terminal, `Lines` of one without, and nothing that shows elsewhere."""
    first = comm is None or comm.Get_rank() == 0
    if first and terminal.terminal(2) is None:
        return Lines(total, unit)
    return tqdm(total=total, unit=unit, leave=False, disable=not first)


class Lines:
    """The interface of tqdm's bar, as lines for a log: one for each text that is new, written at once."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit = total, unit
        self.done = 0
        self.said: set[str] = set()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Say what is begun, unless it was said before."""
        if text not in self.said:
            self.said.add(text)
            of = f" of {self.total}" if self.total else ""
            terminal.to_stderr(f"{self.unit} {self.done + 1}{of}: {text}")

    def update(self) -> None:
        """Count one as done."""
        self.done += 1

    def close(self) -> None:
        """Do nothing: there is nothing to remove."""
