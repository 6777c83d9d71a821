"""Files of arrays, .npz or .safetensors: queries, keys and values to read, the sample among them; results to write."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .. import writing
from ..arrays import FLOATS, Array


def sample() -> dict[str, Array]:
    """Return q, k, v of the sample that comes with mpiattn."""
    folder = importlib.resources.files("mpiattn.commands") / "data"
    with importlib.resources.as_file(folder / "smollm2_layer15_gpl3_2048.npz") as path:
        return read(path)


def read(path: Path) -> dict[str, Array]:
    """Return the arrays q, k, v, and d_out if there, of an .npz or .safetensors file."""
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: _bfloat16(file[name]) for name in file.files}
        else:
            arrays = load_file(path)
    except Exception as error:  # whatever a damaged file makes a reader raise
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {error}") from error
    if missing := [name for name in "qkv" if name not in arrays]:
        raise ValueError(f"{path} has {', '.join(arrays) or 'nothing'}, but no {', '.join(missing)}")
    wanted = {name: arrays[name] for name in ("q", "k", "v", "d_out") if name in arrays}
    for name, array in wanted.items():
        if array.ndim != 4 or array.dtype not in FLOATS:
            raise ValueError(
                f"{path}: {name} is {array.dtype} {array.shape}; it must have 4 axes (batch, heads, tokens, head_dim) "
                f"of {', '.join(dtype.name for dtype in FLOATS)}"
            )
    return wanted


def write(path: Path, arrays: dict[str, Array]) -> None:
    """Write arrays to an .npz or .safetensors file."""
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
