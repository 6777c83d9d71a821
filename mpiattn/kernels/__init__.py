"""Block attention of one rank, forward and backward; no MPI. Which kernel computes is decided here, once."""

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import version
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ..arrays import gpus
from ..errors import InputError
from ..problems.dropout import Dropout
from ..problems.problem import Problem
from ..problems.scalars import check_name
from .contract import Kernel

if TYPE_CHECKING:
    from .pieces.kernel import PieceKernel

KERNELS = {"numpy": ("numpy", "torch"), "cupy": ("cupy", "cudnn", "flash4")}
"""The kernels for each kind of arrays, the one that can do everything first."""

FASTEST_FIRST = "flash4", "cudnn"
"""Kernels on GPUs that are tried before "cupy"."""

ORDER = "fixed order of sums"
LACKS = {
    "torch": {"softcap", "dropout", ORDER},
    "cudnn": {"softcap", "dropout", ORDER},
    "flash4": {"softcap", "dropout"},
}
"""Features, of these three, that a kernel lacks."""


def check(kernel: str | None) -> None:
    """Raise ValueError where there is no kernel of that name."""
    if kernel is not None:
        check_name("kernel", kernel, [name for names in KERNELS.values() for name in names])


def choose(
    kind: str, problem: Problem, scale: float | None = None, name: str | None = None, softcap: float | None = None,
    dropout: Dropout | None = None, rounds: bool = True, deterministic: bool = False,
) -> Kernel:  # fmt: skip
    """Return the kernel that is the fastest for a problem, or the one that is asked for.

    Parameters
    ----------
    kind : {"numpy", "cupy"}
        Kind of the arrays.
    problem : Problem
    scale, softcap
        See `algorithms.base.Attention`.
    name : {"numpy", "torch", "cupy", "cudnn", "flash4"}, optional
    dropout : Dropout, optional
        What the kernel will have to drop; it is told at each call.
    rounds : bool
        Whether complete sums may be rounded to the inputs' dtype: nothing is added to them elsewhere.
    deterministic : bool
        Whether sums are to be the same bits from run to run.

    Raises
    ------
    InputError
        Where the kernel asked for can't do it; it says which can.
    """
    names = KERNELS[kind]
    if name is not None and name not in names:
        raise InputError(f"kernel {name!r} does not work on {kind} arrays: choose from {', '.join(names)}")
    features = (("softcap", softcap), ("dropout", dropout), (ORDER, deterministic or None))
    wanted = {feature for feature, value in features if value is not None}
    able = [kernel for kernel in names if not LACKS.get(kernel, set()) & wanted]
    if not able or (name or able[0]) not in able:
        others = [kernel for kernel in dict.fromkeys(("numpy", *names)) if not LACKS.get(kernel, set()) & wanted]
        raise InputError(f"kernel {name or names[0]!r} has no {' and '.join(sorted(wanted))}: {', '.join(others)} can")
    if kind == "numpy":
        from .numpy.kernel import NumpyKernel
        from .torch import choice

        reason = choice.reason(problem, wanted)
        if name == "torch" and reason:
            raise InputError(f"kernel 'torch' can't do this: {reason}; kernel 'numpy' can")
        if name == "torch" or (name is None and not reason and choice.faster(problem.dtype)):
            from .torch.kernel import TorchKernel

            return TorchKernel(scale)
        return NumpyKernel(scale, softcap)
    for library in FASTEST_FIRST:
        if library in able and name in (None, library):
            reason, kernel = _by_library(library, problem, scale, rounds, deterministic)
            if kernel is not None:
                return kernel
            if name is not None:
                raise InputError(f"kernel {name!r} can't do this: {reason}; kernel 'cupy' can")
    from .cupy.kernel import CupyKernel

    return CupyKernel(scale, softcap)


def _by_library(
    name: str, problem: Problem, scale: float | None, rounds: bool, deterministic: bool
) -> tuple[str, Kernel | None]:
    """Return why a library's kernel can't do a problem, or the kernel."""
    if name == "flash4":
        from .flash4.library import unable

        reason = unable(problem, scale)
    else:
        from .cudnn import library

        reason = library.unable(problem)
    group = problem.heads // problem.kv_heads
    reason = reason or _on_trial(name, problem.dtype, group, problem.head_dim, problem.v_head_dim)
    return reason, None if reason else _of_library(name, scale, problem.dtype, rounds, deterministic)


def _of_library(
    name: str, scale: float | None, dtype: np.dtype[np.generic], rounds: bool = True, deterministic: bool = False
) -> PieceKernel:
    """Return a library's kernel; see `choose`."""
    if name == "flash4":
        from .flash4.kernel import Flash4Kernel

        return Flash4Kernel(scale, dtype, rounds, deterministic)
    from .cudnn.kernel import CudnnKernel

    return CudnnKernel(scale, dtype, rounds)


def _on_trial(name: str, dtype: np.dtype[np.generic], group: int, head_dim: int, v_head_dim: int) -> str:
    """Return why a library's kernel is not to be used on the current GPU, the empty string if it may be."""
    import cupy

    return _tried(name, cupy.cuda.Device().id, dtype, group, head_dim, v_head_dim)


@functools.cache
def _tried(name: str, device: int, dtype: np.dtype[np.generic], group: int, head_dim: int, v_head_dim: int) -> str:
    """Return the same for a device; a library's kernel is tried once for each kind of heads."""
    import cupy

    from .cupy.kernel import CupyKernel
    from .trial import fault

    kernel = _of_library(name, None, dtype)
    with cupy.cuda.using_allocator(None):  # not from the pool: its bytes are the algorithm's
        reason = fault(kernel, CupyKernel(), cupy, dtype, group, head_dim, v_head_dim)
    return reason or ("it has no plan for this" if kernel.without_plan else "")


def on_gpus(tried: bool) -> str:
    """Return in one line which kernels compute on GPUs, and why no others do.

    Parameters
    ----------
    tried : bool
        Whether the libraries are loaded and tried on this rank's GPU, which takes seconds; else what is installed.
    """
    if importlib.util.find_spec("cupy") is None:
        return "none: CuPy is not installed"
    if not gpus():
        return "none: CuPy finds no GPU"
    from .cudnn.library import loaded
    from .flash4.library import generation, missing, unknown, unusable

    cudnn, without_cudnn = loaded()
    without = {"flash4": unknown(generation()) or missing(), "cudnn": without_cudnn}
    if tried:
        usual = np.dtype(ml_dtypes.bfloat16), 1, 128, 128
        without["flash4"] = without["flash4"] or unusable() or _on_trial("flash4", *usual)
        without["cudnn"] = without["cudnn"] or _on_trial("cudnn", *usual)
    there = [] if without["flash4"] else [f"flash4 {version('flash-attn-4')}"]
    if not without["cudnn"]:
        there.append(f"cudnn {cudnn.backend_version_string()}, frontend {cudnn.__version__}")
    kernels = f"{'; else '.join(there)}: float16, bfloat16; else cupy" if there else "cupy"
    return "; ".join([kernels, *(f"no {name}: {why}" for name, why in without.items() if why)])
