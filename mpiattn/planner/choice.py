"""The planner's choice for a communicator, agreed on by its ranks: `algorithm="auto"`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arrays, virtual
from ..algorithms import ALGORITHMS, Attention
from ..algorithms.agreement import tabulated
from ..algorithms.options import Options
from ..errors import InputError
from ..machines import load
from ..machines.machine import Machine
from ..messages.connection import check, private
from ..messages.hosts import by_host
from ..messages.message import Communicator
from ..problems.mask import Mask
from ..problems.scalars import plain, shown, whole
from ..problems.user_mask import UserMask, held
from .search import Ranking, plan
from .task import Task

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Choice:
    """The choice for a communicator, the same on every rank.

    Attributes
    ----------
    plan : Ranking
        What was run in virtual time, the fastest first.
    places : tuple of int
        The place of each rank of the communicator in the one that the algorithm is given: host by host, and
        within the hosts as the grid is to lie on them.
    """

    plan: Ranking
    places: tuple[int, ...]

    @property
    def algorithm(self) -> type[Attention]:
        """The class of the algorithm."""
        return ALGORITHMS[self.plan.best.candidate.algorithm]

    @property
    def arguments(self) -> dict[str, Any]:
        """Its own arguments, such as rows and cols."""
        return dict(self.plan.best.candidate.arguments)

    def explain(self) -> list[str]:
        """Return what was chosen, and three lines why: bytes, exposed time, memory."""
        return [f"auto: {self.plan.best.candidate.title} (machine: {self.plan.machine.name})", *self.plan.explain()]

    def attention(self, comm: Communicator, **options: Unpack[Options]) -> Attention:
        """Return the algorithm, built; the communicator of ranks in another order is kept with `comm`.

        Mask, layout and partials are by default those that were planned for.

        Which tokens a rank owns goes by its place: ask `attention.positions`, and scatter and gather
        over `attention.comm`. Rank 0 is rank 0 there, too.
        """
        moved = self.places != tuple(range(len(self.places)))
        ordered = private(comm).Split(0, self.places[comm.Get_rank()]) if moved else comm
        task = self.plan.task
        options = {"mask": task.mask, "layout": task.layout, "partials": task.partials, **options}
        return self.algorithm(ordered, **options, **self.arguments)


def choose(
    comm: Communicator,
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    mask: Mask | None = None,
    layout: str | None = None,
    backward: bool = True,
    kv_tokens: int | None = None,
    v_head_dim: int | None = None,
    partials: str = "wide",
    machine: str | Machine | None = None,
    memory: float | None = None,
    algorithms: Sequence[str] | None = None,
) -> Choice:
    """Choose algorithm and grid for a problem on the ranks of a communicator.

    Rank 0 runs the few candidates with the best estimates in virtual time (see `plan`) and tells the others.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All its ranks call this, with the same arguments.
    tokens, heads, head_dim, kv_heads, batch, dtype, mask, layout, backward, kv_tokens, v_head_dim, partials
        Of the whole problem; see `Task`. kv_heads are as many as heads where not given.
    machine : str or Machine, optional
        A name or a file, as `mpiattn calibrate` writes one. By default a preset: where CuPy is loaded and
        finds GPUs, a100-ib for A100s and h200-ib for others; else laptop on one host, ethernet on several. On a
        virtual cluster, its own. How many ranks a host has is taken from the communicator.
    memory : float, optional
        Bytes that a rank may use; by default the machine's.
    algorithms : names, optional
        Only these.

    Raises
    ------
    InputError
        On every rank alike, where arguments differ or make no sense, or nothing fits: says what would.
    """
    check(comm)
    asked: dict[str, Any] = {
        "tokens": tokens, "heads": heads, "kv_heads": heads if kv_heads is None else kv_heads, "head_dim": head_dim,
        "batch": batch, "dtype": dtype, "mask": held(mask), "backward": backward,
        "layout": layout, "kv_tokens": kv_tokens, "v_head_dim": v_head_dim, "partials": partials,
    }  # fmt: skip
    asked = {name: plain(value) for name, value in asked.items()}
    texts = comm.allgather(repr((asked, machine, plain(memory), algorithms)))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise InputError(f"rank {rank} asks for a plan of {text}, rank 0 of {texts[0]}")
    if isinstance(asked["mask"], UserMask) and (length := whole(tokens)):
        keys = length if kv_tokens is None else asked["kv_tokens"]
        asked["mask"] = tabulated(comm, asked["mask"], np.arange(length), length, keys)
    hosts, near = by_host(comm)
    found, error = None, None
    if comm.Get_rank() == 0:
        try:
            described = here(len(hosts) > near) if machine is None else machine
            described = load(described) if isinstance(described, str) else described
            if not isinstance(described, Machine):
                raise InputError(f"a machine is a Machine, a name, or the path of a TOML file, got {shown(machine)}")
            described = replace(described, ranks_per_node=near)
            found = plan(Task(**asked), described, len(hosts), memory, algorithms, quick=True)
        except InputError as wrong:
            error = str(wrong)
        except Exception as wrong:  # the others wait
            error = f"{type(wrong).__name__}: {wrong}"
    found, error = comm.bcast((found, error))
    if found is None:
        raise InputError(error)
    order = found.best.candidate.order(len(hosts))
    return Choice(found, tuple(order[hosts.index(rank)] for rank in range(len(hosts))))


def auto(
    comm: Communicator, *, tokens: int, heads: int, head_dim: int, kv_heads: int | None = None, batch: int = 1,
    dtype: str = "float32", mask: Mask | None = None, layout: str | None = None, backward: bool = True,
    kv_tokens: int | None = None, v_head_dim: int | None = None, partials: str = "wide",
    machine: str | Machine | None = None, memory: float | None = None, algorithms: Sequence[str] | None = None,
    scale: float | None = None, softcap: float | None = None, kernel: str | None = None, gpu_messages: str = "auto",
    deterministic: bool = False,
) -> Attention:  # fmt: skip
    """Return the algorithm that `choose` chooses, built; a with block frees it at the end, as any.

    Parameters
    ----------
    comm, tokens, ..., algorithms
        See `choose`.
    scale, softcap, kernel, gpu_messages, deterministic
        See `Attention`.

    Returns
    -------
    Attention
        On `attention.comm`, where the ranks may be in another order; see `Choice.attention`.

    Raises
    ------
    InputError
        As `choose` and `Attention`.
    """
    choice = choose(
        comm, tokens=tokens, heads=heads, head_dim=head_dim, kv_heads=kv_heads, batch=batch, dtype=dtype, mask=mask,
        layout=layout, backward=backward, kv_tokens=kv_tokens, v_head_dim=v_head_dim, partials=partials,
        machine=machine, memory=memory, algorithms=algorithms,
    )  # fmt: skip
    return choice.attention(
        comm, scale=scale, softcap=softcap, kernel=kernel, gpu_messages=gpu_messages, deterministic=deterministic
    )


def here(several: bool) -> Machine:
    """Return the description of the virtual cluster that runs, or a preset that suits this host; see `choose`."""
    if virtual.now() is not None:
        return virtual.current().machine
    if "cupy" in sys.modules and (gpus := arrays.gpus()):
        return load("a100-ib" if "A100" in gpus[0] else "h200-ib")
    return load("ethernet" if several else "laptop")
