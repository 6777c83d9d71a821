"""Folders as Hugging Face has them: config.json, *.safetensors and tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..arrays import FLOATS, Array
from ..errors import InputError
from ..machines.reading import content
from .config import Config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Safetensors' names of the dtypes that a weight may have."""


class Folder:
    """A Hugging Face folder of a Llama.

    Parameters
    ----------
    path : Path

    Raises
    ------
    InputError
        Where a file is missing, damaged or cut, or is of another model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        given = read_json(path / "config.json")
        try:
            self.config = Config.from_json(given)
        except InputError as error:
            raise InputError(f"{path / 'config.json'}: {error}") from None
        names = [SINGLE]
        if not (path / SINGLE).is_file() and (path / INDEX).is_file():
            index = read_json(path / INDEX)
            table = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
                raise InputError(f"{path / INDEX} has no weight_map that names a file for each weight")
            names = sorted({Path(name).name for name in table.values()})
        self.files: dict[str, Any] = {}
        self.found: dict[str, tuple[int, ...]] = {}
        for name in names:
            self.open(path / name)

    def open(self, path: Path) -> None:
        """Look what is in a file of weights; the library checks that the header's sizes are those of the file."""
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            file: Any = safe_open(path, "numpy")
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if part.get_dtype() not in CODES:
                    raise InputError(f"{path}: {name} is {part.get_dtype()}; a weight is {', '.join(CODES.values())}")
                self.files[name], self.found[name] = file, tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is cut, damaged or no .safetensors file: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight of the files by its name."""
        return self.found

    def read(self, name: str) -> Array:
        """Return a weight in the dtype that it has in the file."""
        weight: Array = self.files[name].get_tensor(name)
        assert weight.dtype in FLOATS
        return weight


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or raise InputError."""
    try:
        return json.loads(content(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def alike(config: Config, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise InputError where the weights of a file are not those that the config asks for."""
    for name, shape in config.shapes.items():
        if name not in shapes:
            raise InputError(f"{path} has no weight {name}, which its config asks for")
        if shapes[name] != shape:
            raise InputError(f"{path}: {name} is {shapes[name]}; by its config it must be {shape}")
    unused = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in sorted(set(shapes) - set(config.shapes) - unused):
        if not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{path} has a weight {name}, which its config does not know")


def finite(name: str, weight: Array, path: Path) -> Array:
    """Return the weight, or raise InputError where a number of it is none."""
    if not np.isfinite(weight).all():
        raise InputError(f"{path}: {name} has numbers that are not finite")
    return weight
