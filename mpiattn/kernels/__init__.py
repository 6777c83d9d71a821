"""Block attention of one rank, forward and backward; no MPI. Which kernel computes is decided here, once."""

from __future__ import annotations

import importlib.util

from ..arrays import gpus
from ..errors import InputError
from ..problems.dropout import Dropout
from ..problems.problem import Problem
from ..problems.scalars import check_name
from .contract import Kernel

KERNELS = {"numpy": ("numpy", "torch"), "cupy": ("cupy", "cudnn")}
"""The kernels for each kind of arrays, the one that can do everything first."""

LACKS = {"cudnn": {"softcap", "dropout"}, "torch": {"softcap", "dropout"}}
"""Features, of softcap and dropout, that a kernel lacks."""


def check(name: str | None) -> None:
    """Raise ValueError where there is no kernel of that name."""
    if name is not None:
        check_name("kernel", name, [kernel for kernels in KERNELS.values() for kernel in kernels])


def choose(
    kind: str, problem: Problem, scale: float | None = None, name: str | None = None, softcap: float | None = None,
    dropout: Dropout | None = None, rounds: bool = True,
) -> Kernel:  # fmt: skip
    """Return the kernel that is the fastest for a problem, or the one that is asked for.

    Parameters
    ----------
    kind : {"numpy", "cupy"}
        Kind of the arrays.
    problem : Problem
    scale, softcap
        See `algorithms.base.Attention`.
    name : {"numpy", "torch", "cupy", "cudnn"}, optional
    dropout : Dropout, optional
        What the kernel will have to drop; it is told at each call.
    rounds : bool
        Whether complete sums may be rounded to the inputs' dtype: nothing is added to them elsewhere.

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
    from .cudnn.kernel import CudnnKernel
    from .cudnn.library import unable
    from .cupy.kernel import CupyKernel

    reason = "" if name == "cupy" else unable(problem)
    if "cudnn" not in able:
        reason = reason or "it has no softcap and no dropout"
    if name == "cudnn" and reason:
        raise InputError(f"kernel 'cudnn' can't do this: {reason}; kernel 'cupy' can")
    return CupyKernel(scale, softcap) if name == "cupy" or reason else CudnnKernel(scale, problem.dtype, rounds)


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
