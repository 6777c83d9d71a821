"""Check an implementation of attention against the oracle: values, gradients, and every byte it receives.

By default all of mpiattn's algorithms. With --module MODULE:FACTORY yours, a module of the current folder or an
installed one, in which FACTORY is a class or a function:

  class MyRing:
      def __init__(self, comm, layout, mask, scale):  # an mpi4py communicator: Create_cart, Sub, Isend, Sendrecv, ...
          if str(mask) not in ("full", "causal"):     # what it can't do it says, on all ranks: the case is refused
              raise NotImplementedError("masks other than full and causal")
      def forward(self, q, k, v):                     # NumPy arrays (batch, heads, this rank's tokens, head_dim)
          return out, saved                           # saved: anything; saved.lse, if it has one, is checked too
      def backward(self, d_out, saved):
          return d_q, d_k, d_v                        # all in the dtype of q

It may have __enter__ and __exit__, too. scale is a number or None, which means 1/sqrt(head_dim). K and V may have
fewer heads. Which tokens a rank has follows from the layout, and what a query sees from the mask:

  from mpiattn.problems.layout import positions       # positions(layout, tokens, comm.size, comm.rank) -> int64
  from mpiattn.problems.mask import allowed           # allowed(mask, query_positions, key_positions) -> bool array

Some cases have the options softcap or partials, give `forward` sinks=ARRAY or dropout=mpiattn.Dropout(...), and ask for
sink_gradient(d_out, saved) -> d_sinks. Refused are cases in which it raises NotImplementedError or mpiattn.InputError,
and with these options and arguments also TypeError or another ValueError. What else it raises is a failure.

Bytes are counted where messages go over the communicator that it is given, or one made from it; what can't be counted
is named. --formula ring compares them with what mpiattn's own algorithm receives. An implementation without mpi4py is
judged by its results with --results-only: FACTORY gets the options alone, and torch.distributed.init_process_group()
finds the other ranks.

Choose cases by --layout, --mask, --dtype and sizes. examples/foreign_ring.py is a whole implementation:

  mpiexec -n 3 mpiattn conformance --module foreign_ring:attention --layout contiguous --mask causal --tokens 12,48

Exit status 1 if any case is wrong; each is printed with what to run it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
from typing import Any

from ...algorithms.spelling import spell
from ...conformance.case import Case
from ...conformance.check import check
from ...conformance.meeting import watched
from ...conformance.player import Received, Refused
from ...errors import InputError
from ...messages.message import Communicator
from .. import gpu, terminal
from ..progress import bar
from . import report
from .options import add_arguments as add_arguments
from .options import cases
from .players import find


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Check every case of every implementation; print what is wrong on rank 0."""
    chosen_cases = cases(args)
    watched_comm: Any = comm
    if args.module and hasattr(comm, "recorder"):  # an ordinary program takes a communicator of MPI; see --patience
        comm = watched_comm.comm
    xp = gpu.namespace(args, comm)
    work = list(itertools.product(find(args, comm), chosen_cases))
    wrong: list[str] = []
    refused: list[report.Refusal] = []
    turns: list[Received] = []
    progress = bar(comm, total=len(work), unit="case")
    for (name, player), case in work:
        progress.set_postfix_str(name)
        alone = reproducer(comm, name, case, args)
        guard = watched(comm, alone, args.patience) if player.foreign else contextlib.nullcontext()
        try:
            with guard:
                turns.append(check(player, comm, case, xp=xp))
        except AssertionError as error:
            wrong.append(f"{error}\n  alone: {alone}")
        except Refused as error:
            refused.append((name, *error.args))
        except InputError as error:
            if args.kernel is None:
                raise InputError(f"{name} refused {case}: {error}") from None
            refused.append((name, case, str(error)))
        progress.update()
    progress.close()
    notes = report.traffic(comm, work[0][0][1], turns) if args.module else []
    if comm.Get_rank() == 0:
        for text in wrong:
            terminal.to_stderr(text)
        passed = len(work) - len(wrong) - len(refused)
        count = f", {len(refused)} refused" if refused else ""
        summary = f"{passed} passed, {len(wrong)} failed{count} on {comm.Get_size()} ranks"
        print(*report.refusals(refused), summary, *notes, sep="\n")
        if args.module and len(refused) == len(work):
            terminal.to_stderr("every case was refused: nothing was checked")
    return 1 if wrong or (args.module and len(refused) == len(work)) else 0


def reproducer(comm: Communicator, name: str, case: Case, args: argparse.Namespace | None = None) -> str:
    """Return the command that runs a case of an implementation alone."""
    which = ["--module" if args and args.module else "--algorithms", name, "--case", str(case)]
    if args:
        formula = spell(*args.formula) if args.formula else None
        for option, value in (("--arrays", args.arrays), ("--kernel", args.kernel), ("--formula", formula)):
            which += [option, value] if value else []
        for option, given in (("--forward-only", args.forward_only), ("--results-only", args.results_only)):
            which += [option] if given else []
    return f"mpiexec -n {comm.Get_size()} mpiattn conformance {shlex.join(which)}"
