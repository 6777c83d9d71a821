"""Arrays as the library takes them: tensors of CuPy's memory, by address; and stand-ins that have no memory."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mpiattn.arrays.cupy.place import Place

Tensor = Any

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}


class Layout(NamedTuple):
    """Shape, strides in numbers, and dtype of a tensor."""

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, place: Place, dtype: str) -> Layout:
        """Return the layout of an array, its tokens before its heads: (batch, tokens, heads, head_dim)."""
        order = (0, 2, 1, 3) if len(place.shape) == 4 else range(len(place.shape))
        return cls(tuple(place.shape[i] for i in order), tuple(place.steps[i] for i in order), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes from the first number to the last."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.steps, strict=True))
        return (last + 1) * SIZES[self.dtype] if math.prod(self.shape) else 0


class Memory:
    """Memory of a GPU at an address, which something else holds; torch reads the attribute."""

    def __init__(self, pointer: int, layout: Layout) -> None:
        size = SIZES[layout.dtype]
        self.__cuda_array_interface__ = {
            "data": (pointer, False),
            "shape": layout.shape,
            "strides": tuple(size * step for step in layout.steps),
            "typestr": np.dtype(f"i{size}").str,  # there is no name for bfloat16
            "version": 2,
        }


def at(pointer: int, layout: Layout, device: int) -> Tensor:
    """Return the tensor that lies at an address, as a compiled kernel takes it the fastest."""
    import torch
    import tvm_ffi

    numbers = torch.as_tensor(Memory(pointer, layout), device=f"cuda:{device}")
    return tvm_ffi.from_dlpack(numbers.view(getattr(torch, layout.dtype)))


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Let torch's new tensors have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


def collecting_warnings(run: Callable[[], object]) -> None:
    """Run, and warn here, as Python does, of what torch warns of in C++: else that happens when its caller returns.

    To the library, memory at no address is worth a warning.
    """
    _collecting().apply(run)


@functools.cache
def _collecting() -> Any:
    import torch

    class Collecting(torch.autograd.Function):  # type: ignore[misc]
        """A function of autograd collects warnings from C++, and gives them to Python at its end."""

        @staticmethod
        def forward(ctx: object, run: Callable[[], object]) -> None:
            """Run."""
            run()

    return Collecting


def stand_in(layout: Layout) -> Tensor:
    """Return a tensor of a layout, in memory of its own or without any."""
    import torch

    return torch.empty_strided(layout.shape, layout.steps, dtype=getattr(torch, layout.dtype), device="cuda")


def layout_of(argument: object) -> Layout | None:
    """Return the layout of a tensor, None of anything else."""
    import torch

    if not isinstance(argument, torch.Tensor):
        return None
    return Layout(tuple(argument.shape), argument.stride(), str(argument.dtype).removeprefix("torch."))


def identity(tensor: Tensor) -> int:
    """Return what two tensors have in common if they are views of one memory."""
    return int(tensor.untyped_storage()._cdata)


def clear(pointer: int, nbytes: int, stream: int) -> None:
    """Queue that memory becomes zeros."""
    import cupy

    cupy.cuda.runtime.memsetAsync(pointer, 0, nbytes, stream)


def current_stream() -> int:
    """Return the stream on which CuPy queues."""
    import cupy

    return int(cupy.cuda.get_current_stream().ptr)


def queueing(device: int, stream: int) -> contextlib.AbstractContextManager[object]:
    """Return a context in which compiled kernels are queued on a stream of a device."""
    import tvm_ffi

    context: contextlib.AbstractContextManager[object] = tvm_ffi.use_raw_stream(_device(device), stream)
    return context


@functools.cache
def _device(number: int) -> object:
    """Return a GPU by its name in the library."""
    import tvm_ffi

    return tvm_ffi.device("cuda", number)
