"""The documents' sample code, redone in NumPy: what it returns beside what is right."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array
from ...arrays.softmax import merge
from ...conformance import oracle
from ...problems.mask import Full
from .report import Report

TOKENS, HEADS, DIM, DEVICES = 64, 4, 16, 4


def make(args: argparse.Namespace) -> Report:
    """Say what is wrong, each with a number that fails."""
    report = Report(args.output, "samples", "What is wrong in the documents' sample code", args.called)
    report.note(
        f"{TOKENS} tokens, {HEADS} heads of {DIM}, {DEVICES} devices, no mask; errors are relative to the largest "
        "value of the right output."
    )
    headers = ("sample code", "what it gives", "right instead")
    report.table([*lab(), *article()], headers)
    return report


class Sample:
    """The same input for all, what is right, and each device's tokens."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.q, self.k, self.v = rng.standard_normal((3, 1, HEADS, TOKENS, DIM))
        self.right, _ = oracle.attention(self.q, self.k, self.v, Full())
        self.parts = np.split(np.arange(TOKENS), DEVICES)

    def error(self, result: Array) -> str:
        """Return a result's error as text."""
        return f"{np.abs(result - self.right).max() / np.abs(self.right).max():.2f}"

    def blocks(self, part: Array, queries: slice | NDArray[np.int64] = slice(None)) -> Any:
        """Return the attention of queries to the keys of one part, normalised on its own."""
        return attention(self.q[:, :, queries], self.k[:, :, part], self.v[:, :, part])


def attention(q: Array, k: Array, v: Array) -> Any:
    """Return softmax(q k^T / sqrt(d)) v."""
    weights = np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(DIM))
    return weights / weights.sum(-1, keepdims=True) @ v


def lab() -> list[tuple[str, str, str]]:
    """Return the rows on the lab."""
    sample = Sample()
    added = sum(sample.blocks(part) for part in sample.parts)
    ones = sum(attention(sample.q, sample.k[:, :, p], np.ones_like(sample.v[:, :, p])) for p in sample.parts).mean()
    own = np.concatenate([sample.blocks(part, part) for part in sample.parts], axis=2)
    most = 2 * DEVICES - 1
    # The lab's performance test: batch 2, 64 features, float32.
    scores = [2 * (n // 4) ** 2 * 4 for n in (512, 8192)]
    held = [2 * (n // 4) * 64 * 4 * 6 for n in (512, 8192)]  # Q, out, two buffers of K and V
    return [
        ("`RingAttentionBlock`: `K_remote = K` in each of the rounds, results added",
         f"error {sample.error(DEVICES * own)}", "each round takes the K/V that arrived; merge by log-sum-exp"),
        ("`process_block`: outputs of separately normalised blocks added up (`output +=`)",
         f"error {sample.error(added)}; the weights of a query sum to {ones:.0f}, not 1",
         f"out = Σ exp(lse_i - lse) out_i, lse = logaddexp of all: error {merged_error(sample, sample.parts)}"),
        ("`simulate_distributed_attention`: the local block is added again in every round",
         f"error {sample.error(added + (DEVICES - 1) * own)}: {most} blocks added where there are {DEVICES}",
         "once, in step 0"),
        ("memory: batch (n/N)² 4 bytes, the scores of one block",
         f"at 512 tokens {scores[0] // 1024} KiB, less than the {held[0] // 1024} that Q, output and two buffers of "
         f"K/V take; at 8,192 {scores[1] // 1024}, {scores[1] // scores[0]} times as much, where {held[1] // 1024} do",
         "Q, output, two buffers of K/V: O(n/N) with a tiled kernel, measured in lab.md"),
    ]  # fmt: skip


def article() -> list[tuple[str, str, str]]:
    """Return the rows on the article."""
    sample = Sample()
    parts = sample.parts
    # A 2 x 2 mesh: device (r, c) has all queries of its row and the keys of column c, of both rows.
    halves = np.split(np.arange(TOKENS), 2)
    column = [np.concatenate([parts[c], parts[2 + c]]) for c in range(2)]
    tiles = [(sample.blocks(column[c], halves[r]), c) for r in range(2) for c in range(2)]
    sliced = np.concatenate([np.split(tile, 2, axis=2)[c] for tile, c in tiles], axis=2)
    averaged = sum(sample.right[:, :, part] for part in parts) / DEVICES
    turned = (np.swapaxes(array, 1, 2) for array in (sample.q, sample.k, sample.v))
    by_heads = np.swapaxes(attention(*turned), 1, 2)
    padding = -TOKENS % 48
    return [
        ("`_all_reduce_row`: a slice of the partial output, called all-reduce",
         f"error {sample.error(sliced)}: each query has seen half of the keys",
         "a reduce-scatter that merges (out, lse)"),
        ("`gather_from_devices`: sum of different tokens' outputs over the device count",
         f"error {sample.error(np.concatenate([averaged] * DEVICES, axis=2))}, and {TOKENS // DEVICES} rows come back "
         f"for {TOKENS}", "concatenate by position: no sum, no division"),
        ("`forward`: Q, K of (batch, tokens, heads, d) multiplied without a transpose",
         f"error {sample.error(by_heads)}: scores of {HEADS} x {HEADS} heads for each token, not {TOKENS} x {TOKENS} "
         "tokens for each head", "heads before tokens"),
        ("`_broadcast_q_row`, `_gather_kv_col`: one group `pg` for rows and columns",
         f"all_gather over {DEVICES} ranks into lists of 2: refused by torch", "one communicator a row, one a column"),
        ("`SequenceParallelMeshAttention`: num_heads // num_devices heads, of a sequence that is split as well",
         f"{32 // 64} heads for 32 heads on 64 devices", "all heads on every device; the tokens are split"),
        ("`scatter_to_devices`: the input cut by columns only",
         "2 x 2 devices get 2 different parts: half of the devices repeat the work of the others", "cut by rank"),
        ("`split_into_tiles`: `F.pad(x, (0, 0, 0, pad_c, 0, pad_r))` of (batch, tokens, d) pads tokens and batch",
         f"tiles of 48 tokens: a batch of 1 becomes {1 + padding}", "no padding: chunks of any length"),
    ]  # fmt: skip


def merged_error(sample: Sample, parts: Sequence[Array]) -> str:
    """Return the error of blocks that are merged as this package does."""
    out, lse = np.zeros(sample.q.shape), np.full(sample.q.shape[:-1], -np.inf)
    for part in parts:  # keys alone: the positions of a full mask don't matter
        merge(out, lse, *oracle.attention(sample.q, sample.k[:, :, part], sample.v[:, :, part], Full()))
    return f"{np.abs(out - sample.right).max() / np.abs(sample.right).max():.0e}"
