"""cuDNN through NVIDIA's Python frontend: whether it is there, and which problems it can do."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

from mpiattn.problems.problem import Problem

LARGEST_HEAD = 256


@functools.cache
def loaded() -> tuple[Any, str]:
    """Return cuDNN's frontend, or None and why it can't be used."""
    if importlib.util.find_spec("cudnn") is None:
        return None, "nvidia-cudnn-frontend is not installed"
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    for name in ("cudart", "nvrtc"):
        # The frontend looks for these where the system's libraries are, not pip's. Without the first one it takes
        # the GPU for an older one, and attention 6 to 8 times as long. Those that are loaded it finds.
        with contextlib.suppress(DynamicLibNotFoundError):
            load_nvidia_dynamic_lib(name)
    import cudnn

    try:
        cudnn.backend_version()
    except Exception as error:
        return None, f"the cuDNN library does not load ({error})"
    return cudnn, ""


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


@functools.cache
def handle_of(device: int) -> int:
    """Return cuDNN's handle for a device."""
    return int(loaded()[0].create_handle())
