"""Text from a model: the prompt is spread over the ranks, then one token after another attends to their caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..algorithms import Attention, DecodeAttention, Saved
from ..algorithms.options import Options
from ..algorithms.sharing import shares_tokens
from ..arrays import Array, namespace
from ..arrays.operations import on_host
from ..errors import InputError
from ..problems.mask import Causal, Full, Positions
from ..problems.scalars import shown, whole
from .cache import Cache
from .llama import Llama

Sampler = Callable[[Array], int]
"""Returns a token, given its logits: (vocabulary,)."""


class Generator:
    """Generation by a Llama on all ranks of an attention.

    Every rank computes a new token's way through the model, and its attention to its own part of the cache. Rank 0
    alone chooses the token and broadcasts it, so that no last bit can part the ranks.

    Parameters
    ----------
    llama : Llama
    attention : Attention
        For the prompt: any algorithm that shares out tokens, causal.
    combine : {"allreduce", "tree"}
        See `DecodeAttention`; each rank needs all heads.

    Raises
    ------
    InputError
        On every rank, where the attention shares out heads.

    Notes
    -----
    The ranks check in the first block that a new token's queries are the same bits on all of them: they must compute
    alike, on processors of one kind.
    """

    def __init__(self, llama: Llama, attention: Attention, combine: str = "allreduce") -> None:
        if not shares_tokens(attention):
            raise InputError("a prompt is shared out by its tokens: take another algorithm, such as mesh or ring")
        self.llama, self.attention, self.comm = llama, attention, attention.comm
        self.xp = namespace(llama.head)
        several: Options = {"kernel": attention.kernel_name, "gpu_messages": attention.gpu_messages, "mask": Causal()}
        single: Options = {**several, "mask": Full()}
        self.several, self.single = (DecodeAttention(self.comm, combine=combine, **own) for own in (several, single))
        self.prefill_seconds = 0.0

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, sampler: Sampler | None = None, cache: Cache | None = None
    ) -> Iterator[int]:
        """Yield new tokens, the same on every rank, up to the end that the model sets or its context is full.

        Parameters
        ----------
        prompt : tokens
            The same on every rank; where a cache is given, what follows on the tokens in it.
        max_new_tokens : int
        sampler : function, optional
            See `Sampler`; the most probable token by default. Rank 0 calls it.
        cache : Cache, optional
            Of an earlier call, which is continued, or an empty one.

        Raises
        ------
        InputError
            On every rank, where the prompt does not fit into the context, has tokens that the model does not know,
            or the cache is not that of these ranks and this model.
        """
        cache = self.cache() if cache is None else cache
        cache.check(self.comm, self.llama.config)
        prompt, max_new_tokens = self.agreed(prompt, cache, max_new_tokens)
        start = time.perf_counter()
        hidden = self.extend(prompt, cache) if cache.length else self.prefill(prompt, cache)
        self.prefill_seconds = time.perf_counter() - start
        context, ends = self.llama.config.max_position_embeddings, self.llama.config.eos_token_id
        for count in range(max_new_tokens):
            token = self.choose(hidden, sampler or greedy)
            yield token
            if token in ends or cache.length == context or count + 1 == max_new_tokens:
                return
            hidden = self.extend([token], cache)

    def cache(self) -> Cache:
        """Return an empty cache."""
        return Cache(self.comm, self.llama.config, self.llama.head, self.xp)

    def agreed(self, prompt: Sequence[int], cache: Cache, max_new_tokens: int) -> tuple[list[int], int]:
        """Return the tokens and how many to generate; raise InputError on every rank where they don't fit the model."""
        known, context = self.llama.config.vocab_size, self.llama.config.max_position_embeddings
        prompts = self.comm.allgather(numbers_of(prompt, max_new_tokens))
        for rank, (tokens, length, wrong) in enumerate(prompts):
            if wrong:
                raise InputError(wrong)
            if (tokens, length) != prompts[0][:2]:
                raise InputError(f"rank {rank} was given another prompt or length than rank 0")
        tokens, length, _ = prompts[0]
        if not tokens:
            raise InputError("the prompt is empty")
        if len(tokens) + cache.length > context:
            before = f", after {cache.length} in the cache" if cache.length else ""
            raise InputError(f"the prompt has {len(tokens)} tokens{before}; the model's context is {context}")
        if unknown := [token for token in tokens if not 0 <= token < known]:
            raise InputError(f"the prompt has token {unknown[0]}; the model knows 0 to {known - 1}")
        return tokens, length

    def prefill(self, prompt: Sequence[int], cache: Cache) -> Array:
        """Fill the cache with a prompt; return the hidden state of its last token, (1, 1, features), on every rank."""
        mine = self.attention.positions(len(prompt))
        cache.extend(mine, len(prompt))

        def attend(block: int, q: Array, k: Array, v: Array) -> tuple[Array, Saved]:
            cache.put(block, k, v)
            return self.attention.forward(q, k, v)

        tokens = self.xp.asarray(np.asarray(prompt, np.int64)[mine][None])
        hidden = self.llama.forward(tokens, mine, attend)
        has_last = [owner for owner, has in enumerate(self.comm.allgather(len(prompt) - 1 in mine)) if has]
        last = np.empty((1, 1, self.llama.config.hidden_size), hidden.dtype)
        if has_last[0] == self.comm.Get_rank():
            last[...] = on_host(hidden[:, -1:])
        self.comm.Bcast(last, has_last[0])
        return self.xp.asarray(last)  # type: ignore[no-any-return]

    def extend(self, tokens: Sequence[int], cache: Cache) -> Array:
        """Add tokens to the cache, each on one rank; return the hidden state of the last one, (1, 1, features)."""
        length = cache.length + len(tokens)
        positions, mine = np.arange(cache.length, length), cache.owned(length)
        own = mine - cache.length
        cache.extend(mine, length)

        def attend(block: int, q: Array, k: Array, v: Array) -> tuple[Array, None]:
            cache.put(block, k[:, :, own], v[:, :, own])
            return self.decode(block, q, *cache.of(block), cache.positions), None

        hidden = self.llama.forward(self.xp.asarray(np.asarray(tokens, np.int64)[None]), positions, attend)
        return hidden[:, -1:]

    def decode(self, block: int, q: Array, k: Array, v: Array, positions: Positions) -> Array:
        """Return the attention of the last tokens, (1, heads, tokens, head_dim), to the caches of all ranks.

        A single token sees all keys. So the query heads that share a K/V head are given as if they were tokens of one
        head: the keys are read once for all of them. What the ranks agree on in the first block holds for all blocks.
        """
        b, heads, tokens, dim = q.shape
        attention, rows = self.several, q
        if tokens == 1:
            attention, rows = self.single, q.reshape(b, k.shape[1], -1, dim)
        out = attention.again(rows, k, v) if block else attention.forward(rows, k, v, kv_positions=positions)[0]
        return out.reshape(b, heads, tokens, -1)

    def choose(self, hidden: Array, sampler: Sampler) -> int:
        """Return the next token: rank 0 chooses, the others receive it."""
        token, wrong = np.empty(1, np.int64), ""
        if self.comm.Get_rank() == 0:
            token[0], wrong = drawn(sampler, on_host(self.llama.logits(hidden)[0, 0]))
        self.comm.Bcast(token, 0)
        if token[0] < 0:
            raise InputError(self.comm.bcast(wrong))
        return int(token[0])

    def free(self) -> None:
        """Free what this object made; all ranks call it together."""
        self.several.free()
        self.single.free()


def numbers_of(prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], int, str]:
    """Return the tokens of a prompt and how many to generate as integers, and what is wrong with them, if anything."""
    try:
        given = list(prompt)
    except TypeError:
        return [], 0, f"a prompt is a sequence of tokens, got {type(prompt).__name__}"
    tokens, length = [whole(token) for token in given], whole(max_new_tokens)
    if None in tokens:
        return [], 0, f"a token is a whole number, got {shown(given[tokens.index(None)])}"
    if length is None or length < 0:
        return [], 0, f"max_new_tokens is at least 0, got {shown(max_new_tokens)}"
    return [token for token in tokens if token is not None], length, ""


def drawn(sampler: Sampler, logits: Array) -> tuple[int, str]:
    """Return the token that a sampler chooses; or -1, and why there is none."""
    try:
        given = sampler(logits)
    except Exception as error:  # the other ranks wait
        return -1, f"the sampler raised {type(error).__name__}: {error}"
    token = whole(given)
    if token is None or not 0 <= token < len(logits):
        return -1, f"the sampler returned {shown(given)}; the model knows 0 to {len(logits) - 1}"
    return token, ""


def greedy(logits: Array) -> int:
    """Return the most probable token."""
    return int(logits.argmax())


class Nucleus:
    """Sampling from the most probable tokens that together have `top_p` of the probability (arXiv 1904.09751).

    Parameters
    ----------
    temperature : float, above 0
        Logits are divided by it.
    top_p : float, above 0, at most 1
    seed : int
        The same seed gives the same text, on any number of ranks.
    """

    def __init__(self, temperature: float, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 < temperature < float("inf"):
            raise InputError(f"a temperature is a number above 0, got {temperature}; without one, text is greedy")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is above 0 and at most 1, got {top_p}")
        if (number := whole(seed)) is None or number < 0:
            raise InputError(f"seed is a whole number, 0 or more, got {shown(seed)}")
        self.temperature, self.top_p = temperature, top_p
        self.rng: Any = np.random.default_rng(number)

    def __call__(self, logits: Array) -> int:
        """Return a token."""
        scores = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scores, kind="stable")
        weights = np.exp(scores[order] - scores[order[0]])
        until = np.cumsum(weights / weights.sum())
        kept = weights[: int(np.searchsorted(until, self.top_p)) + 1]
        return int(order[self.rng.choice(len(kept), p=kept / kept.sum())])
