"""The kernels that FlashAttention-4 queues in a call, written down instead.

Its functions look at their arguments, compile a kernel or find the one compiled before, and queue it: that takes 95 to
260 us of the host, of which queueing a kernel is 5. What they find depends on the layouts of the arrays alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .library import QUEUES, Interface


class Launch(NamedTuple):
    """A compiled kernel, and what it is to be called with."""

    function: Callable[..., object]
    arguments: tuple[object, ...]


Cache = Any  # the library's own kind of dictionary


class Listening:
    """A cache of compiled kernels that gives out kernels which only write down their calls."""

    def __init__(self, cache: Cache, launches: list[Launch]) -> None:
        self.cache, self.launches = cache, launches

    def __contains__(self, key: object) -> bool:
        return key in self.cache

    def __setitem__(self, key: object, function: Callable[..., object]) -> None:
        self.cache[key] = function

    def __getitem__(self, key: object) -> Callable[..., None]:
        function = self.cache[key]

        def write_down(*arguments: object) -> None:
            self.launches.append(Launch(function, arguments))

        return write_down


@contextlib.contextmanager
def written_down(interface: Interface) -> Iterator[list[Launch]]:
    """Let the library write down what it would queue; its arrays may be stand-ins without memory."""
    launches: list[Launch] = []
    functions = [getattr(interface, name) for name in QUEUES]
    before, is_fake = [function.compile_cache for function in functions], interface.is_fake_mode
    try:
        interface.is_fake_mode = lambda: False  # with stand-ins it would compile and queue nothing
        for function, cache in zip(functions, before, strict=True):
            function.compile_cache = Listening(cache, launches)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, of the library's own code
            yield launches
    finally:
        interface.is_fake_mode = is_fake
        for function, cache in zip(functions, before, strict=True):
            function.compile_cache = cache
