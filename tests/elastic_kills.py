"""Kill ranks of `mpiattn train --elastic` at random moments, until one is left; compare the losses with a run alone.

usage: python tests/elastic_kills.py [--kills 20] [--ranks 4] [--steps 300] [--seed 0] [OPTIONS OF mpiattn train]

The Python is one with Open MPI beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import environ, mpiexec_path
from small_llama import toml

ROOT = Path(__file__).parent.parent
LIMIT = 240
"""Seconds for a job."""
PAUSE = 0.4
"""Seconds between two kills, at most; each is at any moment of them."""


def command(folder: Path, steps: int, *more: str) -> list[str]:
    """Return a training command, its config written."""
    config = folder / f"{steps}.toml"
    config.write_text(toml(steps=steps, tokens=32, batch=4, dtype="float64"))
    files = "--text", str(ROOT / "LICENSE"), "--config", str(config)
    return [sys.executable, "-m", "mpiattn", "train", *files, *more]


def alone(folder: Path, steps: int) -> list[float]:
    """Return the losses of a run that nobody disturbs, on one rank."""
    argv = command(folder, steps, "--output", str(folder / "alone"), "--every", str(steps))
    subprocess.run(argv, env=environ(PYTHONPATH=str(ROOT)), check=True, stdout=subprocess.DEVNULL, timeout=LIMIT)
    return list(json.loads((folder / "alone" / "losses.json").read_text())["train"])


class Job(NamedTuple):
    """A job whose ranks were killed: its output and status, its curve, and when each rank of the order was killed."""

    text: str
    status: int
    curve: dict[str, Any]
    kills: list[float]


def disturbed(folder: Path, steps: int, ranks: int, order: list[int], draws: random.Random, *more: str) -> Job:
    """Kill ranks in this order, the first some time after the first step; return how the job went on."""
    output = folder / "disturbed"
    shutil.rmtree(output, ignore_errors=True)
    argv = [mpiexec_path(), "--with-ft", "ulfm", "-n", str(ranks)]
    argv += command(folder, steps, "--elastic", "--output", str(output), "--every", "5", *more)
    lines: list[str] = []
    kills: list[float] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv,
        env=environ(PYTHONPATH=str(ROOT)),
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as job:
        timer = threading.Timer(LIMIT, job.terminate)
        timer.daemon = True
        timer.start()
        for line in job.stdout or ():
            lines.append(line)
            if not kills and line.startswith("step "):
                processes = ranks_of(job.pid)
                for rank in order:
                    time.sleep(draws.random() * PAUSE)
                    kills.append(time.time())
                    with contextlib.suppress(ProcessLookupError):  # the job has failed
                        os.kill(processes[rank], signal.SIGKILL)
        timer.cancel()
    curve = json.loads((output / "losses.json").read_text()) if (output / "losses.json").exists() else {}
    return Job("".join(lines), job.returncode, curve, kills)


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the process of each rank that a launcher has started."""
    found: dict[int, int] = {}
    for process in below(launcher):
        given = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        found |= {int(word[21:]): process for word in given if word.startswith(b"OMPI_COMM_WORLD_RANK=")}
    return found


def below(process: int) -> Iterator[int]:
    """Yield the processes that a process has started, and theirs."""
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            yield child
            yield from below(child)


def difference(curve: Sequence[float], right: Sequence[float]) -> float:
    """Return the largest relative difference of two curves; infinite where one is shorter."""
    pairs = zip(curve, right, strict=False)
    return max(abs(one - other) / other for one, other in pairs) if len(curve) == len(right) else math.inf


def main() -> int:
    """Kill, and print a line for each kill and each job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 20), ("ranks", 4), ("steps", 300), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args, more = parser.parse_known_args()
    draws, left, slowest, worst = random.Random(args.seed), args.kills, 0.0, 0.0
    with tempfile.TemporaryDirectory() as name:
        right = alone(Path(name), args.steps)
        while left:
            order = draws.sample(range(args.ranks), min(left, args.ranks - 1))
            data = draws.choice((1, 2))
            job = disturbed(Path(name), args.steps, args.ranks, order, draws, "--data", str(data), *more)
            if job.status or {rank for death in job.curve["deaths"] for rank in death["ranks"]} != set(order):
                print(job.text, f"status {job.status}")
                return 1
            for rank, killed in zip(order, job.kills, strict=True):
                [death] = [death for death in job.curve["deaths"] if rank in death["ranks"]]
                if death["time"] is None:
                    print(f"rank {rank} killed after the last step")
                    continue
                seconds = death["time"] - killed
                slowest = max(slowest, seconds)
                text = f"rank {rank} killed in step {death['step']}: {death['left']} left"
                print(f"{text}, the next step done {seconds:.2f} s after the kill")
            off = difference(job.curve["train"], right)
            worst = max(worst, off)
            print(f"  {args.steps} steps, --data {data}: losses within {off:.1e} of a run alone", flush=True)
            left -= len(order)
    print(f"{args.kills} kills: the next step at most {slowest:.2f} s later; losses within {worst:.1e}")
    return int(worst > 1e-10)


if __name__ == "__main__":
    sys.exit(main())
