"""Libraries that come with an extra."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import InputError


def library(name: str) -> Any:
    """Return a module of the extra `models`, or raise InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is not installed: pip install 'mpiattn[models]'") from None
