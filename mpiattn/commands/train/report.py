"""Reports and checkpoints of a training run, now and then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...models import checkpoint
from ...models.training import Trainer
from ..root import patiently

Losses = dict[str, Any]
"""The curve so far, as JSON can hold it."""


def judged(trainer: Trainer, waited: float) -> tuple[float | None, list[float]]:
    """Return the loss of the text that is held out, if any, and which share of its time each rank has waited."""
    validation = trainer.validate() if trainer.plan.held_out else None
    return validation, trainer.comm.allgather(waited)


def save(trainer: Trainer, folder: Path, losses: Losses) -> None:
    """Write a checkpoint, and name it."""
    path = patiently(trainer.comm, lambda: checkpoint.save(folder, trainer, losses))
    say(trainer, f"saved {path}: --resume goes on from it")


def progress(trainer: Trainer, losses: Losses, rate: float, waits: list[float]) -> None:
    """Print the losses, the tokens a second of all ranks, and the share of time that the ranks have waited."""
    validation = losses["validation"][-1][1]
    shown = "" if validation is None else f"  validation {validation:.4f}"
    say(
        trainer,
        f"step {trainer.step:5}  loss {losses['train'][-1]:.4f}{shown}  (unigram {losses['unigram']:.4f})  "
        f"{rate:.0f} tokens/s  waiting {min(waits):.0%} to {max(waits):.0%}",
    )


def say(trainer: Trainer, text: str) -> None:
    """Print a line, once."""
    if trainer.comm.Get_rank() == 0:
        print(text, flush=True)
