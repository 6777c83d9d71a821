"""Setting that is simulated to compare with: a layer of LLaMA-7B, ring and mesh, on so many devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...costs import COSTS
from ...machines.machine import Machine
from ...planner import Candidate, Outcome, Task, candidates, simulate
from ...problems.mask import Causal

GB = 1e9
K = 1024

# LLaMA-7B (Touvron et al. 2023, arXiv 2302.13971, table 2)
LAYERS, HIDDEN, HEADS, PARAMETERS = 32, 4096, 32, 6.7e9

RING = Candidate("ring")
LAYER = "One attention layer of LLaMA-7B (32 heads of 128), causal, bfloat16, forward and backward, in virtual time"


def llama(tokens: int) -> Task:
    """Return one attention layer of LLaMA-7B, forward and backward."""
    return Task(tokens, HEADS, HEADS, HIDDEN // HEADS, mask=Causal())


_DONE: dict[tuple[Task, str, int, Candidate], Outcome] = {}


def outcome(task: Task, machine: Machine, ranks: int, candidate: Candidate) -> Outcome:
    """Simulate, once for each case."""
    key = task, repr(machine), ranks, candidate
    if key not in _DONE:
        _DONE[key] = simulate(task, machine, ranks, candidate)
    return _DONE[key]


def volume(task: Task, ranks: int, candidate: Candidate) -> int:
    """Return the bytes that a rank receives, by the formula."""
    cost = COSTS[candidate.algorithm](task.problem(ranks), 0, **dict(candidate.arguments))
    return cost.forward.nbytes + (cost.backward.nbytes if task.backward else 0)


def best_mesh(task: Task, machine: Machine, ranks: int) -> Outcome:
    """Return the mesh that moves the fewest bytes, placed on the nodes in the fastest way; no ring."""
    meshes = candidates(ranks, machine, ["mesh"])
    meshes = [mesh for mesh in meshes if min(mesh.grid) > 1] or [mesh for mesh in meshes if mesh.grid[1] > 1] or meshes
    bytes_of = {mesh: volume(task, ranks, mesh) for mesh in meshes}
    least = [mesh for mesh in meshes if bytes_of[mesh] == min(bytes_of.values())]
    return min((outcome(task, machine, ranks, mesh) for mesh in least), key=lambda result: result.seconds)


def ring_and_mesh(
    task: Callable[[int], Task], machine: Machine, devices: Iterable[int]
) -> list[tuple[int, Outcome, Outcome]]:
    """Return for each number of devices the ring and the best mesh, for the task that goes with it."""
    return [
        (ranks, outcome(task(ranks), machine, ranks, RING), best_mesh(task(ranks), machine, ranks)) for ranks in devices
    ]


def shape(mesh: Outcome) -> str:
    """Return a mesh's grid as text."""
    rows, cols = mesh.candidate.grid
    return f"{rows} x {cols}"
