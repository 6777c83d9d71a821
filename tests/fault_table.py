"""Make the table of faults of docs/faults.md: each fault with each MPI library; see run/faults.sh.

usage: python tests/fault_table.py [--faults kill,stop] [--seconds 3] NAME=MPIEXEC=PYTHON ...
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from launch import environ

ROOT = Path(__file__).parent.parent
PROGRAM, NETWORK = ROOT / "tests" / "faulty.py", ROOT / "run" / "netns.sh"
LIMIT = 120  # seconds for a job

BEGIN, END = "<!-- table of run/faults.sh -->", "<!-- end of the table -->"

FAULTS = {
    "kill": "killed (SIGKILL)",
    "stop": "stopped (SIGSTOP)",
    "exception": "raises an exception",
    "loop": "in a loop without end",
    "order": "calls another collective",
    "receive": "receives what nobody sends",
    "shape": "gives another shape",
    "cut": "link cut",
    "slow": "link slowed to 20 kbit/s",
}


def cut(space: str) -> None:
    subprocess.run(["ip", "-n", space, "link", "set", "net0", "down"], check=True)


def slow(space: str) -> None:
    shape = ["root", "tbf", "rate", "20kbit", "burst", "2kb", "limit", "256mb"]
    subprocess.run(["tc", "-n", space, "qdisc", "replace", "dev", "net0", *shape], check=True)


NETWORKS: dict[str, Callable[[str], None]] = {"cut": cut, "slow": slow}


class Outcome(NamedTuple):
    """How a job ended: what it printed, its status, and seconds after the fault."""

    text: str
    status: int
    seconds: float

    @property
    def message(self) -> str:
        """The line that names the cause."""
        found = re.search(r"cause: (.*)|(InputError: .*)", self.text)
        line = (found[1] or found[2]) if found else "no cause named"
        line = re.sub(r" \(\S+, process \d+\)", "", line)
        return re.sub(r"-CONT \d+", "-CONT N", line).replace("|", "/")


def run(fault: str, mpiexec: str, python: str, seconds: float) -> Outcome:
    """Run a job with a fault on its last rank, or on the link to its host."""
    with tempfile.TemporaryDirectory() as folder:
        program = [PROGRAM, "none" if fault in NETWORKS else fault, "--seconds", seconds, "--file", f"{folder}/s.json"]
        start = [NETWORK, "--hosts", 3, "--mpiexec", mpiexec] if fault in NETWORKS else [mpiexec, "-n", 3]
        argv = [str(word) for word in [*start, python, *program]]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            argv, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environ(PYTHONPATH=str(ROOT))
        ) as job:
            timer = threading.Timer(LIMIT, job.terminate)
            timer.start()
            text, begun = "", float("nan")
            assert job.stdout is not None
            for line in job.stdout:
                text += line
                if found := re.search(r"fault at ([\d.]+)", line):
                    begun = float(found[1])
                    if fault in NETWORKS:
                        time.sleep(0.5)  # in the midst of messages
                        begun = time.time()
                        NETWORKS[fault](f"mpiattn-{job.pid}-node3")
            status = job.wait()
            timer.cancel()
    return Outcome(text, status, time.time() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--page", type=Path, help="whose table is replaced")
    parser.add_argument("libraries", nargs="+", metavar="NAME=MPIEXEC=PYTHON")
    args = parser.parse_args()
    rows, late = [], 0
    for fault in args.faults.split(","):
        for library in args.libraries:
            name, mpiexec, python = library.split("=")
            outcome = run(fault, mpiexec, python, args.seconds)
            print(f"===== {fault}, {name}\n{outcome.text}", file=sys.stderr, flush=True)
            rows.append(f"| {FAULTS[fault]} | {name} | {outcome.message} | {outcome.seconds:.1f} | {outcome.status} |")
            named = "no cause named" not in outcome.message
            late += not (named and outcome.status and outcome.seconds < args.seconds + 5)
    head = "| fault | MPI library | cause that is named | seconds to the end | status |\n|---|---|---|---|---|"
    late_ones = f"Later than 5 s after the timeout, without a cause, or with status 0: {late} of {len(rows)}."
    table = "\n".join([head, *rows, "", f"The timeout is {args.seconds:g} s. {late_ones}"])
    print(table)
    if args.page:
        before, _, rest = args.page.read_text().partition(BEGIN)
        args.page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
