"""The algorithms that share out tokens, which a model's ranks then compute each for itself."""

from __future__ import annotations

from ..errors import InputError
from ..problems.layout import EVERYWHERE
from ..problems.scalars import check_name
from . import ALGORITHMS, Attention

SHARE_TOKENS = tuple(name for name in ALGORITHMS if name not in ("tensor_parallel", "decode"))


def shares_tokens(attention: Attention) -> bool:
    """Return whether each token of an attention's sequence is on one rank alone."""
    return attention.layout != EVERYWHERE and not attention.copied


def check_sharing(algorithm: str) -> None:
    """Raise ValueError where that is no algorithm, or not one that shares out tokens."""
    if algorithm in tuple(ALGORITHMS) and algorithm not in SHARE_TOKENS:
        raise InputError(f"{algorithm} does not share out tokens: choose from {', '.join(SHARE_TOKENS)}")
    check_name("algorithm", algorithm, SHARE_TOKENS)
