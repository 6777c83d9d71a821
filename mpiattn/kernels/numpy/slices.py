"""Products of matrices with the same bits whatever the shapes: of slices so short that no sum is ever rounded.

A BLAS adds up in an order that depends on the shapes, so a score of 10**12 would be another by 10**-3 backward than
forward. Here each number is cut into slices of few bits (Ozaki, Ogita, Oishi and Rump 2012, Numerical Algorithms 59,
"Error-free transformations of matrix multiplication by using fast routines of matrix multiplication and its
applications"). Sums of products of two slices fit into the 53 bits of float64, so they are exact in any order, and
what is left is one fixed sum of three of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SLICES = 3  # of 22 bits where head_dim is 64: more than the 53 of a number


def cut(rows: Array) -> Array:
    """Return the slices of rows beside each other, (tokens, SLICES * dim), the highest bits first.

    Parameters
    ----------
    rows : float64, (tokens, dim)
    """
    bits = (53 - int(np.ceil(np.log2(SLICES * max(rows.shape[1], 1))))) // 2
    _, exponent = np.frexp(np.abs(rows).max(axis=1, keepdims=True, initial=0))
    slices, rest = [], rows
    for end in range(bits, (SLICES + 1) * bits, bits):
        slices.append(np.ldexp(np.rint(np.ldexp(rest, end - exponent)), exponent - end))
        rest = rest - slices[-1]
    result: Array = np.concatenate(slices, axis=1)
    return result


def reversed_columns(rows: Array) -> Array:
    """Return the slices of rows above each other, (SLICES * dim, tokens), the highest bits last."""
    result: Array = np.concatenate(np.split(cut(rows), SLICES, axis=1)[::-1], axis=1).T
    return result


def product(a: Array, b: Array) -> Array:
    """Return the product of rows that `cut` has returned, and others that `reversed_columns` has: (rows, columns)."""
    dim = a.shape[1] // SLICES
    # Of slices whose places sum up to 2, to 1, to 0: the smallest first.
    with np.errstate(invalid="ignore"):  # see Work.product
        low, middle, high = (a[:, : count * dim] @ b[(SLICES - count) * dim :] for count in (3, 2, 1))
        result: Array = (low + middle) + high
    return result
