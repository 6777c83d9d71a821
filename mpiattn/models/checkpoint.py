"""Checkpoints of a training run: a folder for each, which is there whole or not at all.

    FOLDER/step-00000200/model.safetensors      weights, under Hugging Face's names
                         config.json            of the model; with the tokenizer, `mpiattn generate` takes the folder
                         tokenizer.json
                         optimiser.safetensors  AdamW's means and mean squares
                         state.json             steps done, the plan, the losses so far, and the sizes of the others

A new one is written beside the others under another name, with all its bytes on the disk before it gets its own:
a process killed at any moment leaves the last one as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..arrays.operations import on_host
from ..errors import InputError, WriteError
from .folder import SINGLE, read_json
from .plan import BYTES, Plan
from .training import Trainer

PREFIX, PART = "step-", ".part-"
OPTIMISER, STATE = "optimiser.safetensors", "state.json"
FREE = "steps", "recompute", "max_position_embeddings"
"""Keys that a run that goes on may have otherwise: its length, the memory it takes, what a reader of it may read."""
TUNED = "learning_rate", "lowest", "warmup", "beta1", "beta2", "eps", "weight_decay", "clip"
"""Keys of the optimiser, which a run that goes on may change, and is told so: see `retuned`."""
KEPT = 2
"""Checkpoints that stay in the folder: the last ones."""


def save(folder: Path, trainer: Trainer, losses: dict[str, Any]) -> Path:
    """Write a checkpoint, on one rank; return its folder.

    Parameters
    ----------
    folder : Path
        That all checkpoints of the run are in.
    trainer : Trainer
    losses : dict
        What JSON can hold: the curve so far.

    Raises
    ------
    WriteError
        Where it can't be written, as on a full disk; those before it are as they were.
    """
    path = folder / f"{PREFIX}{trainer.step:08}"
    with _whole(path) as part:
        save_file({name: _plain(weight) for name, weight in trainer.weights.items()}, part / SINGLE)
        moments = {f"mean {name}": _plain(mean) for name, mean in trainer.optimiser.means.items()}
        moments |= {f"square {name}": _plain(square) for name, square in trainer.optimiser.squares.items()}
        save_file(moments, part / OPTIMISER)
        (part / "config.json").write_text(json.dumps(trainer.plan.model.to_json(), indent=1), "utf-8")
        (part / "tokenizer.json").write_text(json.dumps(byte_tokenizer()), "utf-8")
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        state = {"step": trainer.step, "plan": trainer.plan.to_tables(), "text": trainer.checksum}
        state |= {"losses": losses, "bytes": sizes}
        (part / STATE).write_text(json.dumps(state, indent=1), "utf-8")
    for old in complete(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def resume(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Set the trainer's weights and optimiser to a checkpoint's; return the losses that were saved.

    The number of ranks, the algorithm and what `FREE` and `TUNED` name may be others than when it was written.

    Raises
    ------
    InputError
        Where the checkpoint is damaged, or that of another plan or text.
    """
    state = read_json(path / STATE)
    try:
        sizes, step, losses = dict(state["bytes"]), int(state["step"]), dict(state["losses"])
        saved, checksum = Plan.from_tables(state["plan"]), state.get("text", trainer.checksum)  # older ones have none
    except KeyError as error:
        raise InputError(f"{path / STATE} is damaged: it has no {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path / STATE} is damaged: {error}") from None
    wrong = [text for name, text in others(trainer.plan, saved).items() if name not in TUNED]
    if checksum != trainer.checksum:
        wrong.append("the text is another one")
    if wrong:
        raise InputError(
            f"{path} goes on with what it began with; for another run name another folder: {', '.join(wrong)}"
        )
    for name, size in sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise InputError(f"{path / name} is missing or cut: it had {size} bytes")
    try:
        weights, moments = load_file(path / SINGLE), load_file(path / OPTIMISER)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    optimiser = trainer.optimiser
    for name, weight in trainer.weights.items():
        found = weights.get(name), moments.get(f"mean {name}"), moments.get(f"square {name}")
        for array, place in zip(found, (weight, optimiser.means[name], optimiser.squares[name]), strict=True):
            if array is None or array.shape != place.shape or array.dtype != place.dtype:
                raise InputError(f"{path} is the checkpoint of another model: {name} does not fit")
            place[...] = trainer.xp.asarray(array)
    optimiser.steps = step
    trainer.round()
    return losses


def retuned(path: Path, plan: Plan) -> list[str]:
    """Return what the optimiser has otherwise from now on than up to a checkpoint, which is sound."""
    found = others(plan, Plan.from_tables(read_json(path / STATE)["plan"]))
    return [text for name, text in found.items() if name in TUNED]


def others(plan: Plan, saved: Plan) -> dict[str, str]:
    """Return in words, by its key, what decides the weights after a step and differs from the plan that was saved."""
    tables = [one.to_tables() for one in (plan, saved)]
    now, then = ({**table["model"], **table["training"]} for table in tables)
    return {
        name: f"{name} is {now.get(name)} in the config and {then.get(name)} in the checkpoint"
        for name in {**now, **then}
        if name not in FREE and now.get(name) != then.get(name)
    }


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the last one last."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / STATE).is_file())


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name `path` at the end of the with block, if that does not fail."""
    part = path.with_name(f"{PART}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{PART}*"):  # of runs that were killed
            shutil.rmtree(left)
        part.mkdir()
        yield part
        for file in (*part.iterdir(), part):
            _to_disk(file)
        if path.exists():  # of a run that went on from an earlier checkpoint
            shutil.rmtree(path)
        part.rename(path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise WriteError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(array: Any) -> Any:
    return np.ascontiguousarray(on_host(array))


def byte_tokenizer() -> dict[str, Any]:
    """Return the tokenizer.json whose tokens are bytes: byte-level BPE without merges.

    Byte-level BPE writes each byte as a character that can be seen: itself, where it can, else one from 256 on.
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(BYTES) if byte not in seen]
    letters = {chr(byte): byte for byte in seen} | {chr(BYTES + place): byte for place, byte in enumerate(hidden)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": letters, "merges": []}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}
