"""Measure the machine at hand, and write the description that the planner and the virtual cluster read.

Latency and bandwidth between two ranks of one host and of two hosts, with all ranks busy at once as in the
algorithms; how large a message may be that leaves before its receive is posted; the kernel's rate for several
sizes of a block, with all ranks computing at once; copies in memory, and what it takes to start one. On GPUs
messages are of device memory, or go through the host, as the algorithms' do; a block is called as often as fills some
milliseconds, and what it takes to queue a call and to post a message is measured apart. Run it as the algorithms will
run:

    mpiexec -n 4 mpiattn calibrate --output here.toml
    run/gpu.sh -n 4 mpiattn calibrate --arrays cupy --output here.toml
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from types import ModuleType

import numpy as np

from ... import arrays, machines
from ...errors import InputError
from ...machines import writing
from ...machines.machine import Machine, Rates
from ...machines.reading import memory
from ...messages.device.channel import Channel
from ...messages.device.comm import DeviceComm
from ...messages.hosts import hosts as hosts_of
from ...messages.message import Communicator
from ...planner.units import counts
from .. import gpu
from ..env.environment import environment
from ..progress import bar
from ..root import on_root, patiently
from . import blocks, links, passes

DEFAULTS = {
    "numpy": {"bytes": 2**20, "tokens": [32, 128, 512, 2048], "heads": 8, "head_dim": 64, "dtypes": "float32"},
    "cupy": {"bytes": 2**26, "tokens": [2**n for n in range(10, 16)], "heads": 32, "head_dim": 128,
             "dtypes": "bfloat16"},
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mpiattn calibrate`."""
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the description, in TOML")
    parser.add_argument("--name", help="of the machine (default: the file's name)")
    parser.add_argument("--bytes", type=int, metavar="N", help="of the large messages (default 1 MiB, on GPUs 64 MiB)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="medians of so many (default 7)")
    parser.add_argument(
        "--tokens",
        type=counts,
        metavar="N,...",
        help="block sizes for the kernel (default 32,128,512,2048, on GPUs 1024 to 32768)",
    )
    parser.add_argument("--heads", type=int, metavar="N", help="of the kernel's blocks (default 8, on GPUs 32)")
    parser.add_argument("--head-dim", type=int, metavar="N", help="default 64, on GPUs 128")
    parser.add_argument("--dtypes", metavar="NAME,...", help="default float32, on GPUs bfloat16")
    gpu.add_arguments(parser, gradients=False)


def main(args: argparse.Namespace, comm: Communicator) -> int:
    """Measure, and write the description on rank 0."""
    xp = gpu.namespace(args, comm)
    sizes, dtypes = complete(args, xp)
    on_root(comm, lambda: writing.check(args.output))
    progress = bar(comm, total=3 + len(dtypes) * len(sizes), unit="measurement")
    hosts = hosts_of(comm)
    per_node = max(map(len, hosts))
    messages = comm if xp is np else DeviceComm(comm, Channel(comm, xp, args.gpu_messages))
    found, overhead = links.measure(messages, hosts, args.bytes, args.rounds, xp, progress.update)
    bandwidth = passes.copies(comm, args.rounds, xp)
    launch = passes.launches(comm, dtypes[0], args.head_dim, args.rounds, xp)
    progress.update()
    compute = {}
    for dtype in dtypes:
        columns = []
        for size in sizes:
            shape = 1, args.heads, size, args.head_dim
            columns.append(blocks.rates(comm, shape, dtype, args.kernel, args.rounds, xp))
            progress.update()
        forward, backward, calls = zip(*columns, strict=True)
        compute[dtype.name] = Rates(tuple(sizes), forward, backward, min(calls))
    progress.close()
    eager = links.eager_limit(comm) if xp is np else 0  # messages of device memory wait for their receive
    library = environment(comm)["mpi"]

    def finish() -> None:
        source = f"mpiattn calibrate on {comm.Get_size()} ranks of {len(set(hosts))} hosts, {platform.platform()}"
        machine = Machine(
            name=args.name or args.output.stem,
            source=f"{source}, {library}".replace('"', "'"),
            ranks_per_node=per_node,
            memory=memory() / per_node if xp is np else xp.cuda.Device().mem_info[1],
            memory_bandwidth=bandwidth,
            launch=launch,
            links=found,
            compute=compute,
            overhead=overhead,
            eager=eager,
        )
        machines.write(machine, args.output)
        print(args.output.read_text())

    patiently(comm, finish)
    return 0


def complete(args: argparse.Namespace, xp: ModuleType) -> tuple[list[int], list[np.dtype[np.generic]]]:
    """Set what wasn't given to what suits NumPy or GPUs; return sizes of blocks, ascending, and dtypes."""
    for name, value in DEFAULTS[xp.__name__].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.bytes, args.rounds, args.heads, args.head_dim) < 1:
        raise InputError("--bytes, --rounds, --heads and --head-dim must be 1 or more")
    try:
        return sorted(set(args.tokens)), [arrays.dtype(name) for name in args.dtypes.split(",")]
    except ValueError as error:
        raise InputError(f"--dtypes: {error}") from None
