"""The benchmark of overlap."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import mpiexec


def test_bench_overlap(tmp_path: Path) -> None:
    """Messages don't move on their own: without pokes they are waited for.

    Where others take a core, a rank waits for the other one either way; so it is measured until they leave both alone.
    """
    shares = []
    for _ in range(20):
        without, pokes = measured(tmp_path / "o.json")
        assert (without["progress"], pokes["progress"]) == (False, True)
        for row in (without, pokes):
            assert row["overall"] >= row["wait"] >= 0 and 0 <= row["overlap"] <= 1
            assert row["overall"] >= 0.5 * row["compute"] > 0 and row["communication"] > 0
            assert len(row["rounds"]) == 5
        shares.append((pokes["wait_share"], without["wait_share"]))
        if pokes["wait_share"] < 0.5 * without["wait_share"]:
            return
    raise AssertionError(f"shares of waiting with pokes, and without: {shares}")


def measured(file: Path) -> list[dict[str, Any]]:
    """Return what the benchmark writes, without pokes and with them."""
    words = ("bench", "overlap", "--mib", "4", "--ratios", "2", "--rounds", "5", "--json", file)
    done = mpiexec(2, sys.executable, "-m", "mpiattn", *words)
    assert done.returncode == 0, done.stderr
    assert "overlap" in done.stdout and "Testall" in done.stdout
    document = json.loads(file.read_text())
    assert document["bytes"] == 4 * 2**20
    results: list[dict[str, Any]] = document["results"]
    return results


@pytest.mark.any_mpi
def test_bench_overlap_refuses_one_rank() -> None:
    done = mpiexec(1, sys.executable, "-m", "mpiattn", "bench", "overlap")
    assert done.returncode == 2
    assert done.stderr.count("two or more ranks") == 1


@pytest.mark.any_mpi
def test_bench_overlap_refuses_nonsense() -> None:
    done = mpiexec(2, sys.executable, "-m", "mpiattn", "bench", "overlap", "--rounds", "0")
    assert done.returncode == 2
    assert done.stderr.count("above zero") == 1
