"""The ranks meet after each turn of a foreign implementation, and learn how it went. Nothing hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

from ..messages.ending import end_job
from ..messages.message import Communicator, Testall, Waitall
from .player import Refused


def meet(comm: Communicator, error: Exception | None, patience: float) -> list[Refused | str | None]:
    """Return what each rank's turn ended with: None, Refused, or the text of an exception.

    A rank that has raised waits so many seconds for the others, which may wait for a message of its. Where they do not
    come, the job ends with the traceback.
    """
    arrived, begun = comm.Ibarrier(), time.monotonic()
    while error is not None and not Testall([arrived]):
        if time.monotonic() - begun > patience:
            text = "".join(traceback.format_exception(error))
            end(comm, f"rank {comm.Get_rank()} failed, and others still run {patience:g} s later:\n{text}")
        time.sleep(0.001)
    Waitall([arrived])
    mine = error if error is None else Refused(*error.args) if isinstance(error, Refused) else said(error)
    outcomes: list[Refused | str | None] = comm.allgather(mine)
    return outcomes


def said(error: BaseException) -> str:
    """Return an exception and where it was raised, as far as there is a source to show."""
    *_, place = (frame for frame in traceback.extract_tb(error.__traceback__) if frame.line)
    return f"raised {type(error).__name__}: {error}\n    {place.filename}, line {place.lineno}: {place.line}"


@contextlib.contextmanager
def watched(comm: Communicator, what: str, seconds: float) -> Iterator[None]:
    """End the job, and say where this rank is, where what is done in a with block takes longer than that."""

    def late() -> None:
        sys.stderr.write(f"rank {comm.Get_rank()} is not done with {what} after {seconds:g} s; it is here:\n")
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        time.sleep(1)  # the other ranks have something to say, too
        os._exit(1)  # not Abort: a second thread may not call MPI while the first is stuck in it

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end(comm: Communicator, text: str) -> NoReturn:
    """End the job with a text."""
    if not hasattr(comm, "Abort"):  # virtual ranks
        raise RuntimeError(text)
    end_job(comm, text)
