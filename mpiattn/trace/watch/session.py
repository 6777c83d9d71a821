"""The watch of a program: `with mpiattn.watch(comm):`."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ...errors import InputError
from ...messages import observer
from ...messages.connection import check
from ...messages.message import Tag, constant
from ...problems.scalars import real, shown
from . import wires
from .record import Kind, Recorder, State

T = TypeVar("T")

BOOT = """\
import sys, types
package = types.ModuleType("mpiattn")  # without its __init__: the monitor starts in 30 ms, and loads no MPI
package.__path__ = [sys.argv[1]]
sys.modules["mpiattn"] = package
from mpiattn.trace.watch.monitor import main
sys.exit(main())
"""


class watch:
    """Watch the ranks of a communicator: say who waits for whom when they are stuck, and end the job.

    A process beside the ranks of each host sees their last messages and waits, also when they are stopped or dead. When
    no step has been made for some time, it prints once, on the host of rank 0, what each rank waits for, where the
    chain of waiting ends or closes, and where the ranks are in their programs; it writes the last steps of all ranks to
    a file for `mpiattn trace`; then it ends the ranks, so that the job ends with a status other than 0.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All its ranks begin the block together.
    seconds : float
        Without a step, where a rank waits for others, or is inside of an attention. A rank that is killed or whose
        host is lost is noticed earlier.
    file : path
        For the last steps, written by the host of rank 0 when the ranks are stuck.

    Returns
    -------
    comm : WatchedComm
        From the with statement: the communicator, whose messages and collectives are watched. Attentions that are
        built in the block on `comm`, or on a part of it, are watched anyway.

    Raises
    ------
    InputError
        On every rank, where one cannot be watched, or is watched already.

    Examples
    --------
    >>> with mpiattn.watch(comm, seconds=60):
    ...     with mpiattn.MeshAttention(comm) as attention:
    ...         out, saved = attention.forward(q, k, v)
    """

    def __init__(self, comm: Any, seconds: float = 60.0, *, file: str | Path = "mpiattn-stuck.json") -> None:
        check(comm)
        if (real(seconds) or 0) <= 0:
            raise InputError(f"seconds is {shown(seconds)}: the watch takes a number above 0")
        self.plain, self.seconds, self.file = comm, float(seconds), str(Path(file).absolute())

    def __enter__(self) -> Any:
        from .comm import WatchedComm

        comm = self.plain
        host = comm.Split_type(constant("COMM_TYPE_SHARED"))
        folder, wrong = None, "it is watched already" if observer.observer is not None else ""
        if host.rank == 0 and not wrong:
            folder, wrong = attempt(lambda: tempfile.mkdtemp(prefix="mpiattn-watch-", dir=memory_folder()))
        folder = host.bcast(folder)
        if folder and not wrong:
            _, wrong = attempt(lambda: self.record(Path(folder)))
        self.start(comm, host, folder, wrong)
        host.Free()
        self.comm = WatchedComm(comm, self.recorder, tuple(range(comm.size)), "comm")
        observer.set_observer(self)
        return self.comm

    def record(self, folder: Path) -> None:
        """Begin to record the steps of this rank, and have it write its stack when it is asked to."""
        from .host import DUMP

        rank = self.plain.rank
        self.recorder = Recorder(folder / f"{rank}.steps", {tag.value: tag.name for tag in Tag})
        self.wire = wires.hold(folder, rank)
        self.stack = open(folder / f"{rank}.stack", "ab")  # noqa: SIM115
        faulthandler.register(DUMP, file=self.stack, all_threads=True)
        self.dump = DUMP

    def start(self, comm: Any, host: Any, folder: str | None, wrong: str) -> None:
        """Start the process that watches the ranks of this host; agree on what is wrong, and raise it."""
        from .network import listen, own_addresses

        table = comm.allgather((host.bcast(comm.rank), socket.gethostname(), os.getpid(), wrong))
        leaders = {leader for leader, _, _, _ in table}
        settings = {
            "name": socket.gethostname(), "folder": folder, "seconds": self.seconds, "file": self.file,
            "ranks": [(rank, pid) for rank, (leader, _, pid, _) in enumerate(table) if leader == table[comm.rank][0]],
            "table": [(name, pid) for _, name, pid, _ in table], "hosts": len(leaders),
            "launcher": os.getppid(),
        }  # fmt: skip
        handles, meeting = [], None
        if not any(wrong for *_, wrong in table):
            if comm.rank == 0 and len(leaders) > 1:
                listener = listen()
                meeting = own_addresses(), listener.getsockname()[1], os.urandom(16).hex()
                handles, settings["listener"] = [listener.fileno()], listener.fileno()
            if len(leaders) > 1:
                settings["addresses"], settings["port"], settings["secret"] = comm.bcast(meeting)
            if host.rank == 0:
                _, wrong = attempt(lambda: begin(settings, handles))
            if handles:
                listener.close()
        for rank, reason in enumerate(comm.allgather(wrong)):
            if reason:
                raise InputError(f"rank {rank} can't be watched: {reason}")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        observer.set_observer(None)
        text = "".join(traceback.format_exception_only(error)).strip() if error else ""
        self.recorder.state(State.RAISED if error else State.LEFT, text)
        faulthandler.unregister(self.dump)
        self.stack.close()
        if self.wire is not None:
            os.close(self.wire)

    # For `messages.observer`

    def watched(self, comm: Any) -> Any:
        """Return a communicator that is watched, in the place of a plain one."""
        from .comm import WatchedComm

        if not hasattr(comm, "Get_group"):  # another one's stand-in
            return comm
        return WatchedComm(comm, self.recorder, self.comm.translate(comm), "attention")

    def leave(self) -> None:
        """Let this rank end now, without a word."""
        self.recorder.state(State.TOLD)

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Give a name to what happens in a with block."""
        recorder = self.recorder
        number = recorder.name(name)
        recorder.step = 0
        recorder.write(Kind.PASS, number, 0, 0, 0, 0, 0)
        yield
        recorder.write(Kind.END, number, 0, 0, 0, 0, 0)


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Return what `work` returns, or why it can't."""
    try:
        return work(), ""
    except OSError as error:
        return None, str(error)


def memory_folder() -> str:
    """Return a folder for files that are written to all the time: in memory, where Linux has one."""
    shared = "/dev/shm"
    return shared if os.access(shared, os.W_OK) else tempfile.gettempdir()


def begin(settings: dict[str, Any], handles: list[int]) -> None:
    """Start the process that watches the ranks of this host."""
    package = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", BOOT, package], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        pass_fds=handles, start_new_session=True, text=True,
    )  # fmt: skip
    _, _ = process.communicate(json.dumps(settings) + "\n")
    if process.returncode:
        raise OSError(f"the process that watches ended with status {process.returncode}")
