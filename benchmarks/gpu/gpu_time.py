"""Where the time of a forward and backward pass goes on a GPU: its kernels, copies and gaps. Needs torch.

    run/gpu.sh -n 2 python benchmarks/gpu/gpu_time.py --algorithms ring --tokens 16384,65536

Options are those of `mpiattn bench attention`. What torch's profiler records of rank 0, as CUPTI sees it, from the
first call's output on, which the start of the profiler delays.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import tempfile
from pathlib import Path

import torch
from mpi4py import MPI
from torch.profiler import ProfilerActivity, profile

from mpiattn import arrays
from mpiattn.algorithms.spelling import spell
from mpiattn.commands import gpu
from mpiattn.commands.bench import attention, contenders

WORLD = MPI.COMM_WORLD
CALLS = 5
LEAST = 3  # microseconds of a gap
MOST = 8  # gaps printed, by what is before and after


def main() -> None:
    """Profile each algorithm on each number of tokens, and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    attention.add_arguments(parser)
    parser.set_defaults(tokens=[2**14, 2**16])
    args = parser.parse_args()
    xp = gpu.namespace(args, WORLD, "cupy")
    torch.cuda.set_device(xp.cuda.Device().id)
    options = {"layout": args.layout, "partials": args.partials, **gpu.options(args)}
    heads = args.heads, args.kv_heads or args.heads, args.head_dim, arrays.dtype(args.dtype or "bfloat16"), args.mask
    for tokens, (name, arguments) in itertools.product(args.tokens, args.algorithms):
        setting, text = contenders.Setting(WORLD, xp, tokens, *heads, options), spell(name, arguments)
        run = contenders.algorithm(setting, text, name, arguments)[0].run["forward+backward"]
        for _ in range(CALLS):
            run()
        gpu.wait(setting.xp)
        WORLD.Barrier()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(CALLS):
                run()
            gpu.wait(setting.xp)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        if WORLD.rank == 0:
            report(f"{text}, {tokens} tokens, {args.partials} partial sums", events)
        WORLD.Barrier()


def report(title: str, events: list[dict[str, object]]) -> None:
    """Print the time of each kind of work, and of the gaps, a call."""
    work = sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    starts = [e["ts"] for e in work if "merge_parts" in e["name"] or "softmax" in e["name"]]
    marks = starts[:: len(starts) // CALLS]  # passes over an output: as far apart as the calls
    begin = end = marks[0]
    last, times, gaps = "", collections.Counter[str](), collections.Counter[str]()
    for event in (e for e in work if begin <= e["ts"] < marks[-1]):
        name = event["name"].split("<")[0].removeprefix("void ")[:60]
        times[name] += event["dur"]
        if "PtoP" in name:  # beside the kernels
            continue
        if event["ts"] - end > LEAST:
            gaps[f"{last} -> {name}"] += event["ts"] - end
        last, end = name, max(end, event["ts"] + event["dur"])
    calls = CALLS - 1
    whole = marks[-1] - begin
    idle = sum(gaps.values())
    print(f"{title}: {whole / calls / 1e3:.3f} ms a call, of which the GPU is idle {idle / calls / 1e3:.3f} ms")
    for name, microseconds in times.most_common():
        print(f"  {microseconds / calls / 1e3:8.3f} ms  {name}")
    for name, microseconds in gaps.most_common(MOST):
        print(f"  {microseconds / calls / 1e3:8.3f} ms  idle: {name}")


main()
