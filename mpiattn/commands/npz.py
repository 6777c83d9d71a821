"""Arrays of an .npz file, whose sizes are checked before memory is taken for them."""

from __future__ import annotations

import math
import zipfile
from typing import IO

import numpy as np

from ..arrays import Array
from ..machines.reading import memory

DENSEST = 1032
"""Bytes that a byte of a zip file can stand for at most, by the way in which deflate works."""


def names(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the arrays in an archive."""
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def load(archive: zipfile.ZipFile, name: str) -> Array:
    """Return an array of an archive; no pickled object is ever made.

    Raises
    ------
    ValueError, OSError, zipfile.BadZipFile, zlib.error, ...
        Where it is damaged, or larger than what holds it or than this machine's memory.
    """
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        nbytes = announced(member)
    if nbytes > info.file_size or info.file_size > DENSEST * (info.compress_size + 1):
        raise ValueError(f"{nbytes} bytes are announced, and fewer are there")
    if nbytes > memory():
        raise ValueError(f"{nbytes} bytes are announced, and this machine has {memory()}")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def announced(member: IO[bytes]) -> int:
    """Return how many bytes the header of an array announces behind it, 0 where only reading it finds that out."""
    version = np.lib.format.read_magic(member)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        return 0
    shape, _, dtype = headers[version](member)
    if any(length < 0 for length in shape):
        raise ValueError(f"its shape is {shape}")
    return 0 if dtype.hasobject else math.prod(shape) * dtype.itemsize
