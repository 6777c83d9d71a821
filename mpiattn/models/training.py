"""Training of a Llama on a grid of ranks: rows for sequences of the batch, columns for the tokens of a sequence.

    4 ranks, 2 rows:   rank 0: sequence 0, first tokens    rank 1: sequence 0, the others
                       rank 2: sequence 1, first tokens    rank 3: sequence 1, the others

Attention sends along a row; the gradients of the weights are added up over all ranks, in the order of the ranks.
Which sequences a step has goes by the seed and the step alone, so the loss is the same on any number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from ..algorithms import ALGORITHMS, Attention, Saved
from ..algorithms.sharing import check_sharing
from ..arrays import Array, accumulator, dtype
from ..errors import InputError
from ..messages.connection import carrying, private
from ..messages.message import Cartesian, Communicator
from ..messages.reduction import all_reduce
from ..problems.mask import Causal, Positions
from .adamw import AdamW, clip
from .layers import cross_entropy, cross_entropy_backward, linear_backward
from .llama import Llama, add, initial
from .plan import BYTES, Plan

TRAINING, VALIDATION = 1, 2
"""Purpose of a draw of sequences."""


class Trainer:
    """A model, its optimiser, and its text, on the ranks of a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    plan : Plan
    text : bytes
        The same on every rank.
    algorithm : str
        A name in `ALGORITHMS`, of one that shares out tokens.
    data : int
        Rows of the grid: a divisor of the ranks and of the batch.
    xp : module
        numpy or cupy.
    **options
        Of the algorithm, such as layout.

    Raises
    ------
    InputError
        On every rank, where these do not fit together, or the text is too short.
    """

    def __init__(
        self, comm: Communicator, plan: Plan, text: bytes, algorithm: str = "mesh", data: int = 1, xp: ModuleType = np,
        **options: Any,
    ) -> None:  # fmt: skip
        check_sharing(algorithm)
        self.plan, self.xp, self.algorithm, self.options = plan, xp, algorithm, options
        held_out = int(len(text) * plan.held_out)
        self.checksum = hashlib.sha256(text).hexdigest()
        whole = np.frombuffer(text, np.uint8)
        self.text = {TRAINING: whole[: len(whole) - held_out], VALIDATION: whole[len(whole) - held_out :]}
        for what, part in (("train on", self.text[TRAINING]), ("validate on", self.text[VALIDATION])):
            if len(part) <= plan.tokens and (what == "train on" or plan.held_out):
                raise InputError(
                    f"the text has {len(part)} bytes to {what}; a sequence takes {plan.tokens + 1}: "
                    f"with held_out = {plan.held_out} it must have {needed(plan)}"
                )
        self.arrange(comm, data)
        self.build()
        kept, computed = accumulator(plan.dtype), dtype(plan.dtype)  # bfloat16 is trained with weights in float32
        self.weights = {name: xp.asarray(weight) for name, weight in initial(plan.model, plan.seed, kept).items()}
        self.llama = Llama(plan.model, {name: w.astype(computed, copy=False) for name, w in self.weights.items()})
        given = {name: getattr(plan, name) for name in ("beta1", "beta2", "eps", "weight_decay")}
        self.optimiser = AdamW(self.weights, **given)
        self.head = "model.embed_tokens.weight" if plan.model.tie_word_embeddings else "lm_head.weight"

    def arrange(self, comm: Communicator, data: int) -> None:
        """Make the grid of the ranks of a communicator, and its rows; all of them call this, and then `build`."""
        ranks = comm.Get_size()
        if data < 1 or ranks % data or self.plan.batch % data:
            raise InputError(
                f"{data} rows of sequences: a divisor of {ranks} ranks and of the batch of {self.plan.batch}"
            )
        self.comm, self.data = comm, data
        self.own = private(comm)  # what it is all made of
        self.grid: Cartesian = self.own.Create_cart([data, ranks // data], periods=[False, False], reorder=False)
        self.row = self.grid.Sub([False, True])

    def build(self) -> None:
        """Build the attention of a row."""
        self.attention: Attention = ALGORITHMS[self.algorithm](self.row, mask=Causal(), **self.options)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.optimiser.steps

    def train(self) -> float:
        """Do the next step; return its loss: the mean over its tokens, in nats, on every rank.

        Raises
        ------
        InputError
            On every rank, where the loss or the gradients are not finite; the weights stay those before the step.
        """
        loss, gradients = self.gradients(self.step)
        self.update(gradients)
        return loss

    @np.errstate(over="ignore", invalid="ignore")  # the norm says it
    def update(self, gradients: Mapping[str, Array]) -> None:
        """Move the weights, which ends a step: without a message, and to the same bits on every rank."""
        self.finite("norm of the gradients", clip(gradients, self.plan.clip))
        self.optimiser.step(gradients, self.plan.rate(self.step))
        self.round()

    def round(self) -> None:
        """Have the model compute with the weights as they are now, rounded to its dtype."""
        for name, weight in self.weights.items():
            if self.llama.weights[name] is not weight:
                self.llama.weights[name][...] = weight

    @np.errstate(over="ignore", invalid="ignore")  # the loss says it
    def gradients(self, step: int) -> tuple[float, dict[str, Array]]:
        """Return the loss of a step's sequences and its gradients, complete on every rank."""
        tokens, targets, mine = self.drawn(TRAINING, step)
        tape: list[Any] = []
        hidden = self.llama.forward(tokens, mine, self.attend, tape, recompute=self.plan.recompute)
        logits = self.llama.logits(hidden)
        loss = self.finite("loss", self.total(cross_entropy(logits, targets)))
        d_logits = cross_entropy_backward(1 / (self.plan.batch * self.plan.tokens), logits, targets)
        gradients: dict[str, Array] = {}
        d_hidden, d_head, _ = linear_backward(d_logits, hidden, self.llama.head)
        add(gradients, self.head, d_head)
        self.llama.backward(d_hidden, tape, self.attention.backward, gradients, self.attend)
        return loss, self.added_up(gradients)

    def finite(self, name: str, number: float) -> float:
        """Return a number that is the same on every rank, or raise InputError where it is none to go on from."""
        if not math.isfinite(number):
            raise InputError(f"step {self.step + 1}: the {name} is {number}; learn at a lower rate, or warm up longer")
        return number

    def validate(self, batches: int = 4) -> float:
        """Return the loss of sequences from the text that is held out, always the same ones."""
        losses = []
        for number in range(batches):
            tokens, targets, mine = self.drawn(VALIDATION, number)
            logits = self.llama.logits(self.llama.forward(tokens, mine, self.attend))
            losses.append(self.total(cross_entropy(logits, targets)))
        return sum(losses) / batches

    def attend(self, _: int, q: Array, k: Array, v: Array) -> tuple[Array, Saved]:
        """Attend to the tokens of the row's sequences."""
        return self.attention.forward(q, k, v)

    def drawn(self, purpose: int, number: int) -> tuple[Array, Array, Positions]:
        """Return this rank's tokens of a batch, the tokens that follow them, (sequences, tokens), and positions."""
        text, length, sequences = self.text[purpose], self.plan.tokens, self.plan.batch // self.data
        rng = np.random.default_rng([self.plan.seed, purpose, number])
        starts = rng.integers(0, len(text) - length, self.plan.batch)
        first = self.grid.Get_rank() // self.row.Get_size() * sequences
        mine = self.attention.positions(length)
        places = starts[first : first + sequences, None] + mine
        tokens, targets = (self.xp.asarray(text[places + ahead].astype(np.int64)) for ahead in (0, 1))
        return tokens, targets, mine

    def total(self, losses: Array) -> float:
        """Return the mean of the losses of all ranks' tokens."""
        total = np.array([float(losses.sum())])
        all_reduce(self.grid, total)
        return float(total[0]) / (self.plan.batch * self.plan.tokens)

    def added_up(self, gradients: Mapping[str, Array]) -> dict[str, Array]:
        """Return the sums of all ranks' gradients: one all-reduce of all of them."""
        parts = [gradients[name].astype(weight.dtype, copy=False).reshape(-1) for name, weight in self.weights.items()]
        flat = self.xp.concatenate(parts)
        all_reduce(carrying(self.grid, self.xp, self.options.get("gpu_messages", "auto")), flat)
        sums, start = {}, 0
        for name, weight in self.weights.items():
            sums[name] = flat[start : start + weight.size].reshape(weight.shape)
            start += weight.size
        return sums

    def unigram(self) -> float:
        """Return the entropy of the text's single bytes, in nats: the loss of a model that looks at no context."""
        counts = np.bincount(self.text[TRAINING], minlength=BYTES)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def free(self) -> None:
        """Give the attention's memory back; its communicators are kept with the caller's, see `private`."""
        self.attention.free()


def needed(plan: Plan) -> int:
    """Return how many bytes of text have a sequence to train on and one to validate on."""
    parts = [part for part in (plan.held_out, 1 - plan.held_out) if part]
    return math.ceil((plan.tokens + 1) / min(parts))
