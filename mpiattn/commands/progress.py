"""A progress bar on rank 0, where a person watches."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

from ..messages.message import Communicator


def bar(comm: Communicator, total: int, unit: str) -> Any:
    """Return tqdm's bar on rank 0 of a job on a terminal, one that shows nothing elsewhere."""
    return tqdm(total=total, unit=unit, leave=False, disable=comm.Get_rank() != 0 or not on_terminal())


def on_terminal() -> bool:
    """Say whether a person watches: mpiexec stands between a rank and the terminal, so ask the processes above."""
    process = "self"
    for _ in range(5):
        try:
            if os.readlink(f"/proc/{process}/fd/2").startswith(("/dev/pts/", "/dev/tty")):
                return True
            with open(f"/proc/{process}/stat") as file:
                process = file.read().rpartition(")")[2].split()[1]
        except OSError:
            break
    return sys.stderr.isatty()
