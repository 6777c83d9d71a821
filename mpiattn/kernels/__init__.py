"""Block attention of one rank, forward and backward; no MPI. Which kernel computes is decided here, once."""

from __future__ import annotations

from typing import Any

from ..mask import Mask
from ..message import InputError
from ..problem import Problem

KERNELS = {"numpy": ("numpy",), "cupy": ("cupy", "cudnn"), "mpiattn.virtual": ("virtual",)}
"""The kernels for each kind of arrays, the one that can do everything first."""


def check(name: str | None) -> None:
    """Raise ValueError where there is no kernel of that name."""
    names = [name for names in KERNELS.values() for name in names]
    if name is not None and name not in names:
        raise ValueError(f"unknown kernel {name!r}: choose from {', '.join(names)}")


def choose(kind: str, problem: Problem, mask: Mask, scale: float | None, name: str | None = None) -> Any:
    """Return the kernel that is the fastest for a problem, or the one that is asked for.

    Parameters
    ----------
    kind : str
        Kind of the arrays: a name in `arrays.NAMESPACES`.
    problem : Problem
    mask, scale
        See `algorithms.base.Attention`.
    name : {"numpy", "cupy", "cudnn"}, optional

    Raises
    ------
    InputError
        Where the kernel asked for can't do it; it says which can.
    """
    names = KERNELS[kind]
    if name is not None and name not in names:
        raise InputError(f"kernel {name!r} does not work on {kind} arrays: choose from {', '.join(names)}")
    if kind == "numpy":
        from .numpy import NumpyKernel

        return NumpyKernel(mask, scale)
    if kind == "mpiattn.virtual":
        from .virtual import VirtualKernel

        return VirtualKernel(mask, scale, problem)
    from . import cudnn, cupy

    reason = "" if name == "cupy" else cudnn.unable(problem)
    if name == "cudnn" and reason:
        raise InputError(f"kernel 'cudnn' can't do this: {reason}; kernel 'cupy' can")
    return cupy.CupyKernel(mask, scale) if name == "cupy" or reason else cudnn.CudnnKernel(mask, scale)
