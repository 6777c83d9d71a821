"""Tensors as arrays and back, in the same memory: NumPy's on CPUs, CuPy's on CUDA devices."""

from __future__ import annotations

import contextlib
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

Array = Any


def to_array(tensor: Any) -> Array:
    """Return a tensor as an array in the same memory, or as a copy where its numbers lie in another order.

    Parameters
    ----------
    tensor : torch.Tensor
        On a CPU or a CUDA device.

    Returns
    -------
    NumPy or CuPy array, contiguous; None of anything else, which `forward` refuses on all ranks alike
    """
    if not isinstance(tensor, torch.Tensor) or tensor.device.type not in ("cpu", "cuda") or tensor.is_sparse:
        return None
    bare = tensor.detach().contiguous()  # DLPack refuses what requires a gradient; MPI sends memory as it lies
    brain = bare.dtype == torch.bfloat16  # which neither NumPy nor DLPack's takers know: it goes as bytes
    bare = bare.view(torch.int16) if brain else bare
    if bare.device.type == "cpu":
        array = bare.numpy()
    else:
        import cupy

        array = cupy.from_dlpack(bare)
    return array.view(ml_dtypes.bfloat16) if brain else array


def to_tensor(array: Array) -> Tensor:
    """Return an array as a tensor in the same memory."""
    brain = array.dtype == ml_dtypes.bfloat16
    array = array.view(np.int16) if brain else array
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.from_dlpack(array)
    return tensor.view(torch.bfloat16) if brain else tensor


def queue_of(tensor: Any) -> contextlib.AbstractContextManager[object]:
    """Return a context in which CuPy queues its work where torch queues its own: on a tensor's device, its stream.

    Torch calls `backward` in a thread of its own, where CuPy's current device and stream are others.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda":
        return contextlib.nullcontext()
    import cupy

    stack = contextlib.ExitStack()
    stack.enter_context(cupy.cuda.Device(tensor.device.index))
    stack.enter_context(cupy.cuda.ExternalStream(torch.cuda.current_stream(tensor.device).cuda_stream))
    return stack
