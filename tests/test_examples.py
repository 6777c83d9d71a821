"""The programs of examples/: they run on any number of ranks, and get what the package gets."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from launch import mpiexec

import mpiattn
from mpiattn.problems.grid import grids

if TYPE_CHECKING:
    from mpi4py import MPI

EXAMPLES = Path(__file__).parent.parent / "examples"
LINES = {"ring": 60, "mesh": 100}
"""Most lines of each program that are not blank."""


def example(name: str) -> ModuleType:
    """Return a program of examples/ as a module; its main part does not run."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LINES)
def test_stands_alone_on_a_page(name: str) -> None:
    """A program is short and imports NumPy and mpi4py only."""
    text = (EXAMPLES / f"{name}.py").read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= LINES[name]
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert modules <= {"numpy", "mpi4py", "enum"}


def own(comm: MPI.Intracomm) -> Any:
    """Return this rank's q, k, v, d_out: (4, batch, heads, tokens, head_dim)."""
    return np.random.default_rng(comm.rank).standard_normal((4, 2, 3, 6, 4))


def same(mine: Any, packages: Any) -> None:
    """Compare out, lse, d_q, d_k, d_v."""
    for ours, theirs in zip(mine, packages, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def of_package(attention: Any, q: Any, k: Any, v: Any, d_out: Any) -> list[Any]:
    """Return out, lse, d_q, d_k, d_v by an algorithm of the package."""
    with attention:
        out, saved = attention.forward(q, k, v)
        return [out, saved.lse, *attention.backward(d_out, saved)]


@pytest.mark.mpi
def test_ring(comm: MPI.Intracomm) -> None:
    from mpi4py import MPI

    class Listener(MPI.Cartcomm):
        """A communicator that keeps a list of what it sends: tag and receiver."""

        def Isend(self, buf: Any, dest: int, tag: int = 0) -> MPI.Request:
            sent.append((tag, dest))
            return super().Isend(buf, dest, tag)

    sent: list[tuple[int, int]] = []
    program, ring = example("ring"), Listener(comm.Create_cart([comm.size], periods=[True]))
    q, k, v, d_out = own(comm)
    out, lse = program.attention(ring, q, k, v)
    n, following = comm.size, (comm.rank + 1) % comm.size
    assert sent == (n - 1) * [(program.KV, following)]
    sent.clear()
    gradients = program.gradients(ring, q, k, v, out, lse, d_out)
    assert sorted(sent) == (n - 1) * [(program.KV, following)] + n * [(program.D_KV, following)]
    ring.Free()
    attention = mpiattn.RingAttention(comm, mask=mpiattn.Causal(), layout="contiguous")
    same([out, lse, *gradients], of_package(attention, q, k, v, d_out))


@pytest.mark.mpi
def test_mesh(comm: MPI.Intracomm) -> None:
    """Every grid of that many ranks."""
    program = example("mesh")
    q, k, v, d_out = own(comm)
    for rows, cols in grids(comm.size):
        program.sent.clear()
        grid = comm.Create_cart([rows, cols], periods=[True, True])
        row, col = grid.Sub([False, True]), grid.Sub([True, False])
        out, lse = program.attention(row, col, q, k, v)
        gradients = program.gradients(row, col, q, k, v, out, lse, d_out)
        right, below = grid.Shift(1, 1)[1], grid.Shift(0, 1)[1]
        assert sorted(program.sent) == sorted(
            (cols - 1) * [f"Q to {right}", f"OUT to {right}", f"Q to {right}", f"D_Q to {right}"]
            + (rows - 1) * [f"KV to {below}", f"KV to {below}", f"D_KV to {below}"]
        )
        for part in (row, col, grid):
            part.Free()
        options: dict[str, Any] = {"mask": mpiattn.Causal(), "layout": "contiguous"}
        attention = mpiattn.MeshAttention(comm, rows=rows, cols=cols, **options)
        same([out, lse, *gradients], of_package(attention, q, k, v, d_out))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", LINES)
def test_different_numbers_of_tokens_are_refused(comm: MPI.Intracomm, name: str) -> None:
    q, k, v, _ = own(comm)[..., : 5 if comm.rank else 6, :]
    rings = [comm] if name == "ring" else [comm, comm.Split(comm.rank)]  # a mesh of one row
    with pytest.raises(AssertionError, match="same number of tokens"):
        example(name).attention(*rings, q, k, v)
    for made in rings[1:]:
        made.Free()


@pytest.mark.parametrize("ranks", [1, 3, 6])
@pytest.mark.parametrize("name", LINES)
def test_program(name: str, ranks: int) -> None:
    """The program checks itself, and each rank says what it has sent."""
    done = mpiexec(ranks, sys.executable, EXAMPLES / f"{name}.py")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    said = re.findall(r"rank (\d+) [^;]*sent [^;]*; error \de-1[4-9]", done.stdout)
    assert sorted(said) == [str(rank) for rank in range(ranks)]


@pytest.mark.parametrize(("name", "text", "wrong"), [("ring", "before - lse", "lse - lse"), ("mesh", "p * (", "(")])
def test_program_finds_a_mistake(tmp_path: Path, name: str, text: str, wrong: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    assert text in source
    (tmp_path / "wrong.py").write_text(source.replace(text, wrong))
    done = mpiexec(3, sys.executable, tmp_path / "wrong.py")
    assert done.returncode != 0 and "assert error < 1e-12" in done.stderr
