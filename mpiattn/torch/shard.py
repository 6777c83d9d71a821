"""A model of Hugging Face over MPI ranks: each computes some tokens of a batch that all of them have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algorithms import ALGORITHMS, Attention
from ..algorithms.options import agree
from ..errors import InputError
from ..messages.connection import private
from ..messages.message import Communicator
from ..problems.mask import Causal, Mask
from .batch import IGNORED, Batch, fingerprint, laid_out
from .call import Call, SumOfRanks
from .checks import check, check_model, check_options, check_tensors, check_tokens, windows_alone
from .hugging_face import NAME
from .weights import broadcast, refuse, sum_gradients

KEPT = 32
"""Attentions that are kept; a packed batch has some of its own, as its mask is."""


@dataclass(frozen=True)
class Output:
    """Share of a rank in a model's output.

    Attributes
    ----------
    loss : scalar, or None without labels
        The mean over all targets of all ranks. Its `backward` gives the part of this rank's tokens.
    logits : (rows, this rank's tokens, vocabulary)
    places : int64, (rows, this rank's tokens)
        Which of `input_ids.flatten()` they belong to.
    """

    loss: Tensor | None
    logits: Tensor
    places: Tensor


class Sharded:
    """A model whose ranks share out the tokens of each batch; made by `shard`."""

    def __init__(
        self, model: torch.nn.Module, comm: Communicator, algorithm: str, layout: str | None, data: int, **options: Any
    ) -> None:
        comm = private(comm)  # the caller's messages never meet these
        agree(
            comm,
            partial(check, algorithm, data, comm.Get_size()),
            partial(check_options, algorithm, *sorted(options)),
            partial(check_model, model),
        )
        self.model, self.algorithm, self.options, data = model, ALGORITHMS[algorithm], options, int(data)
        self.comm = comm.Create_cart([data, comm.Get_size() // data], periods=[False, False], reorder=False)
        self.sequence = self.comm.Sub([False, True])
        self.groups, self.group = data, self.comm.Get_coords(self.comm.Get_rank())[0]
        self.layout = layout or ("contiguous" if windows_alone(model.config.get_text_config()) else "zigzag")
        self.attentions: dict[tuple[Any, ...], Attention] = {}
        self.attention(Causal())  # says what is wrong with the options
        broadcast(model, self.comm)
        model.set_attn_implementation(NAME)

    def __call__(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Output:  # fmt: skip
        """Compute this rank's tokens of a batch; all ranks call it together.

        Parameters
        ----------
        input_ids : int64, (batch, tokens)
            The same on every rank of a sequence group, as is all else.
        labels : int64, (batch, tokens), optional
            As transformers has them: those of the tokens themselves, shifted here; -100 is no target.
        attention_mask : (batch, tokens), optional
            1 of tokens and 0 of padding, which is on the right.
        position_ids : int64, (batch, tokens), optional
            Where they start again, another document begins, which does not see the one before.

        Returns
        -------
        Output

        Raises
        ------
        InputError
            On every rank, where the batch of one differs, or can't be computed exactly.
        """
        batch, call, targets = self.agreed(input_ids, labels, attention_mask, position_ids)
        ids, positions, places = call.own()
        # With a mask, of tokens alone, transformers does not look for packed documents in the positions.
        given = {"attention_mask": torch.ones_like(ids), "position_ids": positions, "use_cache": False, NAME: call}
        logits = self.model(input_ids=ids, **given).logits[:, : len(call.mine)]
        if batch.labels is None:
            return Output(None, logits, places)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        own = batch.labels[:, call.mine].flatten().to(wide.device)
        # Of the global number of targets: a mean of the ranks' means is another number.
        loss = torch.nn.functional.cross_entropy(wide, own, ignore_index=IGNORED, reduction="sum") / targets
        return Output(SumOfRanks.apply(loss, self.comm), logits, places)

    def agreed(self, *given: object) -> tuple[Batch, Call, int]:
        """Return the batch, what its layers need, and the targets of all groups; raise InputError on every rank."""
        batch, reason = None, None
        names = "input_ids", "labels", "attention_mask", "position_ids"
        try:
            check_tensors(self.model, dict(zip(names, given, strict=True)))
            batch = laid_out(*given)
            check_tokens(self.model, batch.input_ids, batch.labels)  # what padding holds is not computed
        except InputError as error:
            reason = str(error)
        seed = int(torch.randint(2**62, ())) if self.model.training else 0
        refuse(self.comm, reason)
        assert batch is not None
        own = [fingerprint(tensor) for tensor in given], batch.targets, seed
        table, members = self.comm.allgather(own), self.sequence.Get_size()
        for rank, (tensors, *_) in enumerate(table):
            first = rank - rank % members
            for name, tensor, other in zip(names, tensors, table[first][0], strict=True):
                if tensor != other:
                    raise InputError(f"{name} on rank {rank} are others than on rank {first}: both take one batch")
        targets = sum(count for _, count, _ in table[::members])
        if given[1] is not None and not targets:
            raise InputError(f"all labels are {IGNORED}, or the first of a row, which nothing precedes")
        # A seed for each layer of each group.
        seed = table[0][2] + self.group * self.model.config.get_text_config().num_hidden_layers
        return batch, self.call(batch, seed), targets

    def call(self, batch: Batch, seed: int = 0) -> Call:
        """Return what the layers need to know of a batch that the ranks have agreed on."""
        return Call(self.attention, batch, seed)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue prompts by transformers' own `generate`, with a cache that is spread over the ranks.

        Parameters
        ----------
        input_ids : int64, (batch, tokens)
            The same on every rank of a sequence group; prompts of one length.
        attention_mask : (batch, tokens), optional
            All 1.
        **options
            Of transformers' `generate`: `max_new_tokens=64`, `do_sample=True`, `temperature`, `top_p`, `num_beams`,
            `streamer` (on rank 0 alone), ... What is sampled follows from the torch generator of the group's first
            rank.

        Returns
        -------
        int64, (batch, tokens and new tokens), the same on every rank of a group

        Raises
        ------
        InputError
            On every rank, where prompts or options of one differ, are padded, or need another cache.
        """
        from .generate import generate

        return generate(self, input_ids, attention_mask, **options)

    def attention(self, mask: Mask, scale: float | None = None, softcap: float | None = None) -> Attention:
        """Return the attention for layers of one kind, built when the first of them asks; all ranks ask together."""
        key = mask, scale, softcap
        if key not in self.attentions:
            if len(self.attentions) >= KEPT:
                self.attentions.pop(next(iter(self.attentions))).free()
            given = {"layout": self.layout, "mask": mask, "scale": scale, "softcap": softcap, **self.options}
            self.attentions[key] = self.algorithm(self.sequence, **given)
        else:
            self.attentions[key] = self.attentions.pop(key)  # the one used last is the last one
        return self.attentions[key]

    def sum_gradients(self) -> None:
        """Add up the gradients of the weights over all ranks, once before a step; see `sum_gradients`."""
        sum_gradients(self.model, self.comm)

    def free(self) -> None:
        """Give the memory of its attentions back; its communicators are kept with the caller's, see `private`."""
        for built in self.attentions.values():
            built.free()
        self.attentions.clear()

    def __enter__(self) -> Sharded:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.free()


def shard(
    model: torch.nn.Module, comm: Communicator, algorithm: str = "mesh", rows: int | None = None,
    cols: int | None = None, layout: str | None = None, data: int = 1, **options: Any,
) -> Sharded:  # fmt: skip
    """Let the ranks share out the tokens that a causal language model of Hugging Face computes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Built alike on every rank, whatever its attn_implementation; its weights become rank 0's.
    comm : mpi4py.MPI.Comm
        All its ranks call this together.
    algorithm : str
        A name in `mpiattn.ALGORITHMS`, of one that shares out tokens.
    rows, cols : int, optional
        The mesh's grid; the one nearest to a square by default.
    layout : {"zigzag", "contiguous", "striped"}, optional
        Which tokens each rank computes. By default contiguous where all layers have windows, else zigzag.
    data : int
        Groups of ranks that each have batches of their own; the ranks of a group are neighbours.
    **options
        Of the algorithm: `ulysses=2`, `kernel="cupy"`, `partials="narrow"`, ...; but mask, scale and softcap, which
        the model sets for each layer.

    Returns
    -------
    Sharded
        `sharded(input_ids, labels)` computes, `sharded.sum_gradients()` adds up; a context manager frees it.

    Raises
    ------
    InputError
        On every rank, where the model's tokens do not meet in attention alone, or the arguments do not fit.
    """
    grid = {name: number for name, number in (("rows", rows), ("cols", cols)) if number is not None}
    return Sharded(model, comm, algorithm, layout, data, **grid, **options)
