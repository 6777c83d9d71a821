"""Measure how long rings of virtual ranks take to run, forward and backward, on arrays without data.

OMP_NUM_THREADS=1 python benchmarks/virtual/speed.py 256 1024 | tee speed.txt

Each in a process of its own: 1M tokens, 32 heads of 128, 8 K/V heads, bfloat16, full mask, on machine h200-ib.
"""

from __future__ import annotations

import argparse
import os
import time

from tabulate import tabulate

from mpiattn import machines
from mpiattn.commands.env.environment import cpu_model
from mpiattn.planner import Candidate, Outcome, Task, simulate

HEADERS = ("ranks", "wall s", "CPU s", "peak MB", "virtual ms\nforward", "virtual ms\nbackward")


def measure(ranks: int) -> list[str]:
    """Return a row of the table."""
    start = time.perf_counter()
    results, tell = os.pipe()
    child = os.fork()
    if not child:
        outcome: Outcome = simulate(
            Task(tokens=2**20, heads=32, kv_heads=8, head_dim=128), machines.load("h200-ib"), ranks, Candidate("ring")
        )
        os.write(tell, f"{1e3 * outcome.forward:.2f} {1e3 * outcome.backward:.2f}".encode())
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{ranks} ranks failed")
    seconds, kibibytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss  # on Linux
    wall = time.perf_counter() - start
    return [str(ranks), f"{wall:.1f}", f"{seconds:.1f}", f"{kibibytes * 1024 / 1e6:.0f}",
            *os.read(results, 100).decode().split()]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", nargs="+", type=int, metavar="RANKS", help="a ring of so many")
    rows = [measure(ranks) for ranks in parser.parse_args().ranks]
    print(tabulate(rows, HEADERS, disable_numparse=True, stralign="right"))
    print(f"{cpu_model()}, {os.cpu_count()} cores, one of them used; load {os.getloadavg()[1]:.1f}")


if __name__ == "__main__":
    main()
