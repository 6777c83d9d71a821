"""Ends of a command that are not its own: Ctrl-C, a reader that leaves, a full disk, a rank that fails."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING

from ..messages.ending import end_job, until_read
from . import terminal

if TYPE_CHECKING:
    from mpi4py import MPI

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

HEAD_START = 0.5
"""Seconds in which rank 0 says that the job was interrupted, before another rank ends it."""


OUTPUT_LOST = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of standard output; those of files are WriteError, or InputError."""


def wait_for_first_rank(first: bool) -> None:
    """Let Ctrl-C end a rank other than rank 0 without a word.

    It may be in the middle of a collective: it frees nothing and waits for nobody.
    """

    def end(*_: object) -> None:
        time.sleep(HEAD_START)
        os._exit(INTERRUPTED)

    if not first:
        signal.signal(signal.SIGINT, end)


def first(comm: MPI.Comm | None) -> bool:
    """Say whether this rank speaks for all: rank 0, or the first one that is left."""
    if comm is None or not comm.Is_revoked():
        return comm is None or comm.Get_rank() == 0
    ranks, gone = comm.Get_group(), comm.Get_failed()
    lost = gone.Translate_ranks(range(gone.size), ranks)
    return all(rank in lost for rank in range(ranks.rank))


def leave(status: int, comm: MPI.Comm | None) -> int:
    """Return the exit status. Where ranks are gone, end here: MPI_Finalize may wait for them, and for ever."""
    if comm is not None and comm.Is_revoked():
        sys.stdout.flush()
        sys.stderr.flush()
        until_read(sys.stdout.fileno())
        os._exit(status)
    return status


def status(error: BaseException, comm: MPI.Comm) -> int | None:
    """Return the exit status after an exception that nothing has caught; None where it is to be raised.

    An exception on one of several ranks ends the job: the others may wait for a message that will never come.
    """
    several = comm is not None and comm.Get_size() > 1
    if isinstance(error, KeyboardInterrupt):
        if several:
            end_job(comm, "mpiattn: interrupted\n", INTERRUPTED)
        terminal.to_stderr("mpiattn: interrupted")
        return INTERRUPTED
    if several:
        end_job(comm, f"mpiattn: rank {comm.Get_rank()} failed:\n{traceback.format_exc()}")
    if not isinstance(error, OSError) or error.errno not in OUTPUT_LOST:
        return None
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at exit
    if error.errno != errno.EPIPE:  # a reader who has seen enough, as `| head` has, needs no word
        terminal.to_stderr(f"mpiattn: error: standard output: {error.strerror}")
    return 1
