"""A job in which one rank does something wrong in the midst of its attention; see test_watch.py and run/faults.sh.

usage: mpiexec -n 3 python tests/faulty.py FAULT --seconds 2 --file stuck.json

It prints the time at which the fault came, on standard output.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

import mpiattn
from mpiattn.messages.message import Tag, Waitall

CALLS = 20  # of forward, before the fault


def kill(**_: Any) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()


def stop(**_: Any) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGSTOP)).start()


def exception(**_: Any) -> None:
    raise ArithmeticError("something went wrong on this rank alone")


def loop(**_: Any) -> None:
    while True:
        pass


def order(comm: Any, **_: Any) -> None:
    comm.Barrier()


def backward(attention: Any, arrays: list[Any], saved: Any, **_: Any) -> None:
    attention.backward(arrays[0], saved)


def receive(comm: Any, **_: Any) -> None:
    Waitall([comm.Irecv(np.empty(1000), 0, Tag.D_O)])


def shape(arrays: list[Any], **_: Any) -> None:
    arrays[1] = arrays[1][..., :3]


def none(**_: Any) -> None:
    """Nothing is wrong here; in the network around, maybe."""


FAULTS: dict[str, Callable[..., None]] = {
    "kill": kill,
    "stop": stop,
    "exception": exception,
    "loop": loop,
    "order": order,
    "backward": backward,
    "receive": receive,
    "shape": shape,
    "none": none,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--file", default="stuck.json")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--calls", type=int, default=10**6)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    with (
        mpiattn.watch(comm, seconds=args.seconds, file=args.file) as watched,
        mpiattn.RingAttention(comm, layout="contiguous") as attention,
    ):
        saved: Any = None
        mine = len(attention.positions(args.tokens))
        arrays = [np.random.default_rng(comm.rank).random((1, 1, mine, 8), np.float32) for _ in "qkv"]
        for call in range(args.calls):
            if call == CALLS and comm.rank == comm.size - 1:
                print(f"fault at {time.time()}", flush=True)
                FAULTS[args.fault](comm=watched, arrays=arrays, attention=attention, saved=saved)
            _, saved = attention.forward(*arrays)
    if comm.rank == 0:
        print("the end", flush=True)


if __name__ == "__main__":
    main()
