"""Check random cases of the conformance matrix until the time is up; see run/fuzz.sh.

Rank 0 draws the cases, with hypothesis, and tells the others. What it finds wrong it makes as simple as it can, and
prints as a command that runs it alone. So do a case that doesn't end, and one that raises on some of the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mpi4py import MPI

from mpiattn.arrays import FLOATS
from mpiattn.commands.conformance.command import add_arguments, reproducer
from mpiattn.commands.conformance.players import find
from mpiattn.conformance.case import Case
from mpiattn.conformance.check import check
from mpiattn.conformance.user_masks import MASKS as USER_MASKS
from mpiattn.problems.layout import LAYOUTS

ROUND = 50  # cases from one seed; the next round takes the next seed
SECONDS = 120  # after which a case is taken to hang
SCALES = [0.0, 1e-3, 0.7, -1.0]
LARGE = [1e4, 1e6, -1e7]
"""Neither in float64, whose rounding of such scores exceeds its tolerance, nor in float16, which gradients overflow."""
BEYOND = [2**31, 2**63 - 1, 2**63, 10**30]  # tokens of a window: they overflow where a sum of bounds does


@st.composite
def cases(draw: st.DrawFn, decodes: bool) -> Case:
    """Draw a case; the features that every algorithm has in every combination."""
    tokens = draw(st.sampled_from([st.integers(0, most) for most in (20, 60, 60, 60, 300)]).flatmap(lambda s: s))
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    values: dict[str, Any] = {
        "layout": draw(st.sampled_from(list(LAYOUTS))),
        "tokens": tokens,
        "batch": draw(st.integers(1, 2)),
        "heads": group * kv_heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.integers(1, 20)),
        "v_head_dim": draw(st.integers(1, 20)),
        "dtype": draw(st.sampled_from([dtype.name for dtype in FLOATS])),
        "softcap": draw(st.none() | st.floats(0.1, 100)),
        "partials": draw(st.sampled_from(["wide", "narrow"])),
        "dropout": draw(st.just(0.0) | st.floats(0.01, 0.95)),
        "sinks": draw(st.booleans()),
        "scalars": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32)),
    }
    scales = SCALES + (LARGE if values["dtype"] in ("float32", "bfloat16") else [])
    values["scale"] = draw(st.none() | st.sampled_from(scales))
    if values["dtype"] == "float64" and values["scale"] is None and values["head_dim"] > 1:
        values["peak"] = draw(st.sampled_from([0, 0, 1e2, 1e3]))
    reach = st.integers(0, 90) | st.integers(0, 90) | st.sampled_from(BEYOND)
    parts = [f"window={draw(reach)},{draw(reach)}", "causal", "full"]
    parts.append(f"{draw(st.sampled_from(list(USER_MASKS)))}={draw(st.integers(1, 70))}")
    if draw(st.booleans()):
        ends = sorted(draw(st.lists(st.integers(0, tokens), max_size=6)))
        lengths = [b - a for a, b in zip([0, *ends], [*ends, tokens], strict=True)]
        parts.append(f"documents={','.join(map(str, lengths))}")
    elif draw(st.booleans()) and not (decodes and values["dropout"]):
        # The queries of decoding are the last tokens of the sequence: other positions, other keys are dropped.
        values["kv_tokens"] = draw(st.integers(0, 100))
        parts = ["full"] if decodes else parts
    values["mask"] = "+".join(draw(st.lists(st.sampled_from(parts), min_size=1, max_size=2, unique=True)))
    return Case(**values)


class Fuzz:
    """Cases of all variants of all algorithms on the ranks of a communicator."""

    def __init__(self, comm: MPI.Intracomm, algorithms: str) -> None:
        self.comm = comm
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        self.found = find(parser.parse_args(["--algorithms", algorithms]), comm)

    def run(self, number: int, case: Case) -> None:
        """Check a case of one of the implementations on all ranks; raise AssertionError on all if it is wrong."""
        name, player = self.found[number]
        alone = reproducer(self.comm, name, case)
        timer = threading.Timer(SECONDS, self.end, [f"still running after {SECONDS} s: {alone}"])
        timer.daemon = True
        timer.start()
        try:
            check(player, self.comm, case)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{alone}") from None
        except BaseException:
            print(f"rank {self.comm.Get_rank()} failed in: {alone}", file=sys.stderr, flush=True)
            raise
        finally:
            timer.cancel()

    def end(self, text: str) -> None:
        """End the job, from whatever a rank is stuck in."""
        if self.comm.Get_rank() == 0:
            print(text, file=sys.stderr, flush=True)
        os._exit(1)

    def follow(self) -> None:
        """Check what rank 0 draws, until it says that there is no more."""
        while (job := self.comm.bcast(None)) is not None:
            with contextlib.suppress(AssertionError):  # rank 0 has the same
                self.run(*job)

    def lead(self, minutes: float, first_seed: int) -> int:
        """Draw cases until the time is up or one is wrong; return the exit status."""
        end, count, rounds = time.monotonic() + 60 * minutes, 0, 0

        def one(number: int, data: st.DataObject) -> None:
            nonlocal count
            case = data.draw(cases(decodes=self.found[number][0].startswith("decode")))
            if time.monotonic() < end or failed:
                count += 1
                self.comm.bcast((number, case))
                try:
                    self.run(number, case)
                except AssertionError:
                    failed.append(case)
                    raise

        failed: list[Case] = []
        status = 0
        limits = settings(
            max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink], print_blob=False,
        )  # fmt: skip
        while time.monotonic() < end and not status:
            drawn = given(number=st.integers(0, len(self.found) - 1), data=st.data())(one)
            try:
                seed(first_seed + rounds)(limits(drawn))()
            except AssertionError as error:
                print(f"FAILED with seed {first_seed + rounds}: {error}", file=sys.stderr, flush=True)
                status = 1
            rounds += 1
        self.comm.bcast(None)
        seeds = f"seeds {first_seed} to {first_seed + rounds - 1}"
        print(f"{count} cases of {len(self.found)} variants on {self.comm.Get_size()} ranks, {seeds}")
        return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithms", default="all")
    args = parser.parse_args()
    fuzz = Fuzz(MPI.COMM_WORLD, args.algorithms)
    if MPI.COMM_WORLD.Get_rank():
        fuzz.follow()
        return 0
    return fuzz.lead(args.minutes, args.seed)


if __name__ == "__main__":
    sys.exit(main())
