"""The watch that is active in this process, if one is: attentions and their passes are made known to it here.

See `watch`.
"""

from __future__ import annotations

import contextlib
from typing import Protocol, TypeVar

T = TypeVar("T")


class Observer(Protocol):
    """Methods by which a watch learns of communicators and passes."""

    def watched(self, comm: T) -> T:
        """Return a communicator that is watched, in the place of a plain one."""

    def named(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Give a name to what happens in a with block."""

    def leave(self) -> None:
        """Let this rank end now, without a word."""


observer: Observer | None = None


def set_observer(new: Observer | None) -> None:
    """Make a watch the active one, or none."""
    global observer
    observer = new


def watched(comm: T) -> T:
    """Return a communicator that is watched, where a watch is active; else the given one."""
    return comm if observer is None else observer.watched(comm)


def named(name: str) -> contextlib.AbstractContextManager[None]:
    """Give a name to what happens in a with block, such as the forward pass of an algorithm."""
    return NOTHING if observer is None else observer.named(name)


NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
