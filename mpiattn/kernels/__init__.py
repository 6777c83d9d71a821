"""Block attention of one rank, forward and backward; no MPI. Which kernel computes is decided here, once."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..arrays import gpus
from ..errors import InputError
from ..messages.message import virtual_time
from ..problems.dropout import Dropout
from ..problems.mask import Mask
from ..problems.problem import Problem

KERNELS = {"numpy": ("numpy",), "cupy": ("cupy", "cudnn"), "mpiattn.virtual.arrays": ("virtual",)}
"""The kernels for each kind of arrays, the one that can do everything first."""

LACKS = {"cudnn": {"softcap", "dropout"}}
"""What a kernel can't do, of softcap and dropout."""


def check(name: str | None) -> None:
    """Raise ValueError where there is no kernel of that name."""
    if name is not None and not any(name in names for names in KERNELS.values()):
        fits = KERNELS["numpy"] + KERNELS["cupy"]  # the virtual one is not asked for
        raise ValueError(f"unknown kernel {name!r}: choose from {', '.join(fits)}")


def choose(
    kind: str, problem: Problem, mask: Mask, scale: float | None, name: str | None = None,
    softcap: float | None = None, dropout: Dropout | None = None,
) -> Any:  # fmt: skip
    """Return the kernel that is the fastest for a problem, or the one that is asked for.

    Parameters
    ----------
    kind : str
        Kind of the arrays: a name in `arrays.NAMESPACES`.
    problem : Problem
    mask, scale, softcap
        See `algorithms.base.Attention`.
    name : {"numpy", "cupy", "cudnn"}, optional
    dropout : Dropout, optional
        What the kernel will have to drop; it is told at each call.

    Raises
    ------
    InputError
        Where the kernel asked for can't do it; it says which can.
    """
    names = KERNELS[kind]
    if name is not None and name not in names:
        raise InputError(f"kernel {name!r} does not work on {kind} arrays: choose from {', '.join(names)}")
    wanted = {key for key, value in (("softcap", softcap), ("dropout", dropout)) if value is not None}
    able = [kernel for kernel in names if not LACKS.get(kernel, set()) & wanted]
    if not able or (name or able[0]) not in able:
        others = [kernel for kernel in ("numpy", *names) if not LACKS.get(kernel, set()) & wanted]
        raise InputError(f"kernel {name or names[0]!r} has no {' and '.join(sorted(wanted))}: {', '.join(others)} can")
    if kind == "numpy":
        from .numpy.kernel import NumpyKernel

        kernel = NumpyKernel(mask, scale, softcap)
        if virtual_time() is None:
            return kernel
        from ..virtual.kernel import ClockedKernel, VirtualKernel

        return ClockedKernel(kernel, VirtualKernel(mask, scale, problem))
    if kind == "mpiattn.virtual.arrays":
        from ..virtual.kernel import VirtualKernel

        return VirtualKernel(mask, scale, problem)
    from .cudnn.kernel import CudnnKernel
    from .cudnn.library import unable
    from .cupy.kernel import CupyKernel

    reason = "" if name == "cupy" else unable(problem)
    if "cudnn" not in able:
        reason = reason or "it has no softcap and no dropout"
    if name == "cudnn" and reason:
        raise InputError(f"kernel 'cudnn' can't do this: {reason}; kernel 'cupy' can")
    return CupyKernel(mask, scale, softcap) if name == "cupy" or reason else CudnnKernel(mask, scale, problem.dtype)


def on_gpus() -> str:
    """Return in one line which kernel computes on GPUs, and why."""
    if importlib.util.find_spec("cupy") is None:
        return "none: CuPy is not installed"
    if not gpus():
        return "none: CuPy finds no GPU"
    from .cudnn.library import loaded

    cudnn, reason = loaded()
    if cudnn is None:
        return f"cupy: {reason}"
    return f"cudnn {cudnn.backend_version_string()}, frontend {cudnn.__version__}: float16, bfloat16; else cupy"
