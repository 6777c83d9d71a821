"""Block attention of one rank, forward and backward; no MPI. Which kernel computes is decided here, once."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

from ..arrays import gpus
from ..errors import InputError
from ..problems.dropout import Dropout
from ..problems.problem import Problem
from ..problems.scalars import check_name
from .contract import Kernel

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


def check(name: str | None) -> None:
    """Raise ValueError where there is no kernel of that name."""
    if name is not None:
        check_name("kernel", name, [kernel for kernels in KERNELS.values() for kernel in kernels])


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
    kernel: Kernel | None = None
    if name == "flash4":
        from .flash4.library import unable

        reason = unable(problem, scale)
        if not reason:
            from .flash4.kernel import Flash4Kernel

            kernel = Flash4Kernel(scale, problem.dtype, rounds, deterministic)
    else:
        from .cudnn import library

        reason = library.unable(problem)
        if not reason:
            from .cudnn.kernel import CudnnKernel

            kernel = CudnnKernel(scale, problem.dtype, rounds)
    return reason, kernel


def on_gpus() -> str:
    """Return in one line which kernels compute on GPUs, and why no others do."""
    if importlib.util.find_spec("cupy") is None:
        return "none: CuPy is not installed"
    if not gpus():
        return "none: CuPy finds no GPU"
    from .cudnn.library import loaded
    from .flash4.library import unusable

    cudnn, without_cudnn = loaded()
    without_flash4 = unusable()
    there = [] if without_flash4 else [f"flash4 {version('flash-attn-4')}"]
    if cudnn is not None:
        there.append(f"cudnn {cudnn.backend_version_string()}, frontend {cudnn.__version__}")
    missing = [f"no {name}: {why}" for name, why in (("flash4", without_flash4), ("cudnn", without_cudnn)) if why]
    kernels = f"{'; else '.join(there)}: float16, bfloat16; else cupy" if there else "cupy"
    return "; ".join([kernels, *missing])
