"""The virtual cluster: the algorithms' own text on up to a thousand ranks of one process, in virtual time.

To read in this order, each on top of those before:

- `clock`: ranks with a clock, and the agenda of what happens when
- `arrays`: arrays without data, which have a shape and a dtype, and move the clock
- `network`: which ports a message takes, and for how long
- `messages`: sends and receives, from post to completion
- `group`: what the ranks of a communicator share, and what a collective takes
- `collectives`, `comm`: the communicator, with mpi4py's methods
- `cluster`: all of it, started

Arrays with data work as well; only messages, collectives and the kernel then take virtual time. All results are
those of MPI bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import InputError
from ..machines import load
from ..machines.reading import check_memory
from .arrays import VirtualArray as VirtualArray
from .arrays import empty as empty
from .clock import Rank as Rank
from .clock import current as current
from .clock import now as now
from .cluster import Cluster as Cluster
from .cluster import run as run
from .comm import VirtualComm as VirtualComm

LEAST = 10**5
"""Bytes of a virtual rank without arrays, at least."""


def command(main: Any, args: Any) -> int:
    """Run a subcommand on `args.virtual` ranks of one host of the machine `args.machine`; return the exit status."""
    if args.virtual < 1:
        raise InputError(f"--virtual takes 1 rank or more, not {args.virtual}")
    check_memory(LEAST * args.virtual, f"--virtual {args.virtual}")
    one_host = dataclasses.replace(load(args.machine), ranks_per_node=args.virtual)
    return int(max(run(args.virtual, one_host, lambda comm: main(args, comm))))
