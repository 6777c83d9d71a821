"""A reason to ask what all ranks do: what was noticed, in words, and what kind of thing that is."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Kind(str, Enum):
    """Kinds of things that are noticed."""

    QUIET = "quiet"
    """A rank makes no step: it may be stuck, or at long work."""
    GONE = "gone"
    """Ranks have ended without a word."""
    UNWATCHED = "unwatched"
    """The watch of a host has ended, and maybe its ranks have."""
    STOPPED = "stopped"
    """A rank is suspended."""
    SILENT = "silent"
    """Nothing is heard from a host any more."""


class Alarm(NamedTuple):
    """Something that was noticed, and how the report says it."""

    kind: Kind
    text: str
