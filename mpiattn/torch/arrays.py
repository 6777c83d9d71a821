"""Tensors as arrays and back, in the same memory: NumPy's on CPUs, CuPy's on CUDA devices."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ..arrays import Unfit

Array = Any

ON_GPUS = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of tensors on CUDA devices that algorithms take, and those of CuPy."""


def to_array(tensor: Tensor) -> Array:
    """Return a tensor as an array in the same memory, or as a copy where its numbers lie in another order.

    Parameters
    ----------
    tensor : torch.Tensor
        On a CPU or a CUDA device.

    Returns
    -------
    NumPy or CuPy array, contiguous; of anything else what `forward` refuses on all ranks alike
    """
    if not isinstance(tensor, torch.Tensor):
        return Unfit(f"no tensor but {type(tensor).__name__}: torch.as_tensor makes one of an array")
    if tensor.device.type not in ("cpu", "cuda"):
        return Unfit(f"a tensor on the device {tensor.device}: it must be on a CPU or a CUDA device")
    if tensor.layout != torch.strided:
        return Unfit(f"a tensor of the layout {tensor.layout}: tensor.to_dense() makes one that can be sent")
    # NumPy refuses what requires a gradient or is to be negated; MPI sends memory as it lies.
    bare = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if bare.device.type == "cuda":
        return on_gpu(bare)
    brain = bare.dtype == torch.bfloat16  # which NumPy does not know by itself: it goes as bytes
    try:
        array = (bare.view(torch.int16) if brain else bare).numpy()
    except (TypeError, RuntimeError):  # of a dtype that NumPy has not
        return unfit(bare)
    return array.view(ml_dtypes.bfloat16) if brain else array


def unfit(tensor: Tensor) -> Unfit:
    """Return what stands for a tensor of a dtype that is not taken."""
    return Unfit(f"a tensor of {tensor.dtype}: tensor.float() makes one that can be sent")


def on_gpu(tensor: Tensor) -> Array:
    """Return a contiguous tensor on a CUDA device as CuPy's array; by its address, a tenth of DLPack's time."""
    import cupy

    if tensor.dtype not in ON_GPUS:
        return unfit(tensor)
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.nbytes, tensor, tensor.device.index)
    return cupy.ndarray(tuple(tensor.shape), ON_GPUS[tensor.dtype], cupy.cuda.MemoryPointer(memory, 0))


def to_tensor(array: Array) -> Tensor:
    """Return an array as a tensor in the same memory."""
    brain = array.dtype == ml_dtypes.bfloat16
    array = array.view(np.int16) if brain else array
    if isinstance(array, np.ndarray):
        tensor = torch.from_numpy(array)
    else:
        # -1: nothing to wait for, both queue on one stream
        tensor = torch.utils.dlpack.from_dlpack(array.__dlpack__(stream=-1))
    return tensor.view(torch.bfloat16) if brain else tensor


def queue_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which CuPy queues its work where torch does: on a tensor's device, its current stream there.

    Torch calls `backward` in a thread of its own, where CuPy's current device and stream may be others.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda":
        return contextlib.nullcontext()
    import cupy

    device, stream = tensor.device.index, torch.cuda.current_stream(tensor.device)
    if cupy.cuda.runtime.getDevice() == device and cupy.cuda.get_current_stream().ptr == stream.cuda_stream:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(cupy.cuda.Device(device))
    stack.enter_context(external(cupy, stream))
    return stack


def external(cupy: ModuleType, stream: Any) -> Any:
    """Return torch's stream as CuPy's, by the name that this version of CuPy has for it."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)
