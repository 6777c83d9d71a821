"""cuDNN through NVIDIA's Python frontend: whether it is there, and which problems it can do."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path
from typing import Any

from mpiattn.problems.problem import Problem

from ..pieces.library import found, unfit_dtype, unfit_heads

LARGEST_HEAD = 256


@functools.cache
def loaded() -> tuple[Any, str]:
    """Return cuDNN's frontend, or None and why it can't be used."""
    if found("cudnn") is None:
        return None, "nvidia-cudnn-frontend is not installed"
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    # The frontend looks for libraries where the system's are, not pip's; those that are loaded it finds. Without the
    # first one it takes the GPU for an older one, and attention 6 to 8 times as long.
    for name in ("cudart", "nvrtc"):
        with contextlib.suppress(DynamicLibNotFoundError):
            load_nvidia_dynamic_lib(name)
    _load_cudnn()
    import cudnn

    try:
        cudnn.backend_version()
    except Exception as error:
        return None, f"the cuDNN library does not load ({error})"
    return cudnn, ""


def _load_cudnn() -> None:
    """Load the cuDNN that Python's packages bring, as torch does, if they bring one: the system's may be older."""
    package = found("nvidia.cudnn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(Path(folder) / "lib" / "libcudnn.so.9"))


def unable(problem: Problem) -> str:
    """Return why cuDNN can't do a problem, the empty string if it can."""
    cudnn, reason = loaded()
    if cudnn is None:
        return reason
    return unfit_dtype("cuDNN", problem) or unfit_heads("cuDNN", problem, 8, LARGEST_HEAD)


def may_overflow(keys: int) -> bool:
    """Return whether dQ may be NaN with that many keys and no diagonal, where a row's lse is below -88.7.

    On Hopper up to 9.30, cuDNN takes exp(0 - lse) of the half of its last tile of keys that lies behind them
    (cudnn-frontend#628, pytorch#196678).
    """
    return keys % 128 == 64


@functools.cache
def handle_of(device: int) -> int:
    """Return cuDNN's handle for a device."""
    return int(loaded()[0].create_handle())
