"""Files of arrays, .npz or .safetensors: queries, keys and values to read, the sample among them; results to write."""

from __future__ import annotations

import contextlib
import importlib.resources
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..arrays import FLOAT_NAMES, FLOATS, Array
from ..machines import writing
from . import npz

NAMES = ("q", "k", "v", "d_out")

AXES = ("bhtd", "bthd")
"""Orders of the axes batch, heads, tokens and head_dim in a file."""


def sample() -> dict[str, Array]:
    """Return q, k, v of the sample that comes with mpiattn."""
    folder = importlib.resources.files("mpiattn.commands") / "data"
    with importlib.resources.as_file(folder / "smollm2_layer15_gpl3_2048.npz") as path:
        return read(path, NAMES[:3])


def read(path: Path, names: Sequence[str], axes: str = AXES[0]) -> dict[str, Array]:
    """Return arrays of an .npz or .safetensors file; of what else it holds nothing is read.

    Parameters
    ----------
    path : Path
    names : three or four
        Of q, k, v and d_out in the file; d_out may be missing.
    axes : {"bhtd", "bthd"}
        The order of their axes: batch, heads, tokens, head_dim, or tokens before heads.

    Returns
    -------
    dict
        "q", "k", "v", and "d_out" if there, (batch, heads, tokens, head_dim).

    Raises
    ------
    ValueError, OSError
        Where a file is missing or damaged, or has not what is asked for.
    """
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    result = {}
    with _opened(path) as (known, load):
        if missing := [name for name in names[:3] if name not in known]:
            has = f"{path} has {', '.join(known) or 'nothing'}, but no {', '.join(missing)}"
            raise ValueError(f"{has}; --names Q,K,V says what they are called")
        for name, own in zip(NAMES, names, strict=False):
            if own in known:
                array = load(own)
                _check(array, f"{path}: {own}", axes)
                result[name] = array.swapaxes(1, 2) if axes == "bthd" else array
    return result


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], Array]]]:
    """Yield the names in a file, and a function that reads the array of one of them."""
    with contextlib.ExitStack() as stack:
        try:
            if path.suffix == ".npz":
                archive = stack.enter_context(zipfile.ZipFile(path))
                known, load = npz.names(archive), partial(npz.load, archive)
            else:
                tensors = stack.enter_context(safe_open(path, framework="numpy"))
                known, load = list(tensors.keys()), tensors.get_tensor
        except Exception as error:  # whatever a damaged file makes a reader raise
            raise ValueError(f"{path} is damaged or no {path.suffix} file: {error}") from error

        def loaded(name: str) -> Array:
            try:
                return _bfloat16(load(name))
            except AttributeError as error:  # a dtype that NumPy has no name for
                kind = tensors.get_slice(name).get_dtype()
                raise ValueError(f"{path}: {name} is {kind}; {_WANTED}") from error
            except Exception as error:
                text = str(error)
                kind = "an array of Python objects" if "allow_pickle" in text else f"damaged: {text}"
                raise ValueError(f"{path}: {name} is {kind}; {_WANTED}") from error

        yield known, loaded


_WANTED = f"it must be an array of {', '.join(FLOAT_NAMES)}"


def _check(array: Array, what: str, axes: str) -> None:
    if array.ndim != 4 or array.dtype not in FLOATS:
        order = "(batch, heads, tokens, head_dim)" if axes == "bhtd" else "(batch, tokens, heads, head_dim)"
        raise ValueError(f"{what} is {array.dtype} {array.shape}; it must have 4 axes {order}, and {_WANTED[8:]}")


def write(path: Path, arrays: dict[str, Array], axes: str = AXES[0]) -> None:
    """Write arrays to an .npz or .safetensors file, those of four axes in an order of the axes; see `read`."""
    if axes == "bthd":
        arrays = {name: array.swapaxes(1, 2) if array.ndim == 4 else array for name, array in arrays.items()}
    with writing.replacing(path) as part:
        if path.suffix == ".safetensors":
            try:
                save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part)
            except SafetensorError as error:  # it hides what the operating system says
                raise OSError(str(error)) from error
        else:
            np.savez(part, **arrays)  # type: ignore[arg-type]


def check_output(path: Path) -> None:
    """Raise ValueError, before any work, where no file of arrays can be written there."""
    _check_suffix(path)
    writing.check(path)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path}: the name must end in .npz or .safetensors")


def _bfloat16(array: Array) -> Array:
    # NumPy's own format knows no bfloat16 and gives its bytes back as 2-byte voids.
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
