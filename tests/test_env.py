"""mpiattn env: what it reports of the ranks, and when it warns."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from launch import mpiexec

from mpiattn.commands.env import command
from mpiattn.commands.env.environment import environment
from mpiattn.commands.env.groups import ranges
from mpiattn.commands.env.warnings import SOFTWARE, core_warnings, launcher_warnings, mixture_warnings

if TYPE_CHECKING:
    from mpi4py import MPI


def rank(number: int, host: str = "node01", cores: int = 8, threads: int | None = 1, **more: Any) -> dict[str, Any]:
    software = dict.fromkeys(SOFTWARE, "1.0")
    values = {"cpu": "CPU", "omp_num_threads": "1", "blas": "openblas", "devices": [], "pid": 100 + number}
    own = {"rank": number, "host": host, "cores": list(range(cores)), "host_cores": cores, "blas_threads": threads}
    return {**software, **values, **own, **more}


@pytest.mark.mpi
def test_every_rank_knows_all(comm: MPI.Intracomm) -> None:
    info = environment(comm)
    assert [one["rank"] for one in info["ranks"]] == list(range(comm.size))
    assert info["ranks"][comm.rank]["pid"] == os.getpid()
    assert info["ranks"][comm.rank]["cores"] == sorted(os.sched_getaffinity(0))
    assert info["numpy"] == np.__version__
    assert info["thread_level"] in ("single", "funneled", "serialized", "multiple")
    assert "\n" not in info["mpi"]
    assert len(set(comm.allgather(json.dumps(info)))) == 1


@pytest.mark.mpi
def test_printed_and_written_once(comm: MPI.Intracomm, mpi_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = mpi_tmp_path / "env.json"
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.main(parser.parse_args(["--json", str(file)]), comm) == 0
    comm.Barrier()
    printed = capsys.readouterr().out
    assert ("OMP_NUM_THREADS" in printed) == (comm.rank == 0)
    assert len(json.loads(file.read_text())["ranks"]) == comm.size


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_that_blas_got(threads: int) -> None:
    imports = "from mpi4py import MPI; from mpiattn.commands.env.environment import environment"
    code = f"{imports}; print(environment(MPI.COMM_WORLD)['ranks'])"
    done = mpiexec(1, sys.executable, "-c", code, env={"OMP_NUM_THREADS": str(threads)})
    assert f"'omp_num_threads': '{threads}'" in done.stdout
    assert f"'blas_threads': {min(threads, len(os.sched_getaffinity(0)))}," in done.stdout


def test_enough_cores() -> None:
    assert core_warnings([rank(r, threads=2) for r in range(4)]) == []


def test_too_many_threads() -> None:
    warnings = core_warnings([rank(r, threads=8) for r in range(4)])
    assert warnings == ["4 ranks with 8 BLAS threads each on 8 cores of node01: set OMP_NUM_THREADS=2"]


def test_too_many_ranks() -> None:
    warnings = core_warnings([rank(r, cores=2, threads=2) for r in range(3)])
    assert warnings == [
        "3 ranks on 2 cores of node01: oversubscribed, so timings mean little",
        "3 ranks with 2 BLAS threads each on 2 cores of node01: set OMP_NUM_THREADS=1",
    ]


def test_hosts_are_judged_one_by_one() -> None:
    ranks = [rank(0, threads=8), rank(1, host="node02", threads=8), rank(2, host="node02", threads=8)]
    assert core_warnings(ranks) == ["2 ranks with 8 BLAS threads each on 8 cores of node02: set OMP_NUM_THREADS=4"]


def test_bound_to_one_core() -> None:
    (warning,) = core_warnings([rank(r, cores=1, host_cores=8) for r in range(2)])
    assert warning.startswith("2 ranks on 1 core of node01 (bound to them; it has 8): oversubscribed")


def test_bound_to_a_core_each() -> None:
    assert core_warnings([rank(0, cores=8) | {"cores": [r], "rank": r} for r in range(8)]) == []


def test_threads_unknown() -> None:
    assert core_warnings([rank(r, threads=None) for r in range(8)]) == []


def test_other_software_on_some_ranks() -> None:
    ranks = [rank(0), rank(1), rank(2, numpy="2.0"), rank(3)]
    assert mixture_warnings(ranks) == ["the ranks differ in numpy: 1.0 on ranks 0-1, 3; 2.0 on rank 2"]


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_launcher_of_another_library(name: str) -> None:
    assert launcher_warnings({name: "4"}, 4) == []
    assert launcher_warnings({}, 1) == []
    (warning,) = launcher_warnings({name: "4"}, 1)
    assert warning.startswith("4 processes were started, and each is alone")


def test_same_ranks_share_a_line() -> None:
    ranks = [rank(0), rank(1), rank(2, host="node02"), rank(3)]
    info = {**dict.fromkeys(SOFTWARE, "1.0"), "ranks": ranks, "warnings": ["beware"]}
    lines = command.text(info).splitlines()
    assert [line.split()[:3] for line in lines if "node0" in line] == [["0-1,", "3", "node01"], ["2", "node02", "CPU"]]
    assert lines[-1] == "warning: beware"
    assert "GPUs" not in command.text(info)  # nothing to show there


def test_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([5]) == "5"
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
