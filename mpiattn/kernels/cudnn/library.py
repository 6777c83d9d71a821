"""cuDNN through NVIDIA's Python frontend: whether it is there, and which problems it can do."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

from mpiattn.problems.problem import Problem

LARGEST_HEAD = 256


@functools.cache
def loaded() -> tuple[Any, str]:
    """Return cuDNN's frontend, or None and why it can't be used."""
    if importlib.util.find_spec("cudnn") is None:
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
    try:
        package = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:  # of nvidia
        return
    for folder in (package.submodule_search_locations or ()) if package else ():
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(Path(folder) / "lib" / "libcudnn.so.9"))


def unable(problem: Problem) -> str:
    """Return why cuDNN can't do a problem, the empty string if it can."""
    cudnn, reason = loaded()
    if cudnn is None:
        return reason
    if problem.dtype.name not in ("float16", "bfloat16"):
        return f"cuDNN attends in float16 and bfloat16, not {problem.dtype.name}"
    for name, dim in (("head_dim", problem.head_dim), ("v_head_dim", problem.v_head_dim)):
        if dim % 8 or dim > LARGEST_HEAD:
            return f"cuDNN needs a {name} of 8, 16, ..., {LARGEST_HEAD}, not {dim}"
    return ""


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
