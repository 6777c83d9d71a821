"""The pieces that a block is cut into for a library: this needs neither a GPU nor CuPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpiattn.kernels.cudnn.library import may_overflow
from mpiattn.kernels.pieces.cut import MOST_PIECES, SQUARE, Piece, pieces
from mpiattn.problems import layout
from mpiattn.problems.block import Block
from mpiattn.problems.mask import Mask, Positions, allowed, parse


def cut(mask: Mask, queries: Positions, keys: Positions, square: int | None = SQUARE) -> list[Piece] | None:
    """Return the pieces of the block of queries and keys at these positions."""
    start, stop = (np.searchsorted(keys, bound).astype(np.int32) for bound in mask.bounds(queries))
    return pieces(start, stop, Block(mask, queries, keys), square)


@pytest.mark.parametrize("chosen", layout.LAYOUTS)
@pytest.mark.parametrize(
    "mask", ["full", "causal", "window=11", "window=7,4", "documents=20,0,30,{rest}", "documents=20,0,30,{rest}+causal"]
)
@pytest.mark.parametrize(("tokens", "square"), [(64, SQUARE), (3 * SQUARE, SQUARE), (3 * SQUARE, None)])
def test_pieces_cover_what_the_mask_allows_once(chosen: str, mask: str, tokens: int, square: int | None) -> None:
    where = parse(mask.format(rest=tokens - 50))
    for ranks in range(1, 5):
        chunks = [layout.positions(chosen, tokens, ranks, rank) for rank in range(ranks)]
        for queries, keys in itertools.product(chunks, chunks):
            covered = np.zeros((len(queries), len(keys)), np.int64)
            found = cut(where, queries, keys, square)
            assert found is not None
            for piece in found:
                np.testing.assert_array_equal(piece.block.queries, queries[piece.queries])
                np.testing.assert_array_equal(piece.block.keys, keys[piece.keys])
                part = covered[piece.queries, piece.keys]
                i, j = np.indices(part.shape)
                shift = part.shape[1] - part.shape[0] if piece.causal else 0
                assert shift >= 0
                part += (j <= i + shift if piece.causal else True) & (piece.left is None or j > i + shift - piece.left)
            np.testing.assert_array_equal(covered, allowed(where, queries, keys))


def test_keys_before_a_diagonal_are_a_piece_of_their_own_from_some_number_on() -> None:
    keys = np.arange(3 * SQUARE)
    for before, count in ((SQUARE - 1, 1), (SQUARE, 2)):
        found = cut(parse("causal"), keys[before:], keys)
        assert found is not None
        assert [piece.causal for piece in found] == [False, True][-count:]
    assert len(cut(parse("causal"), keys[SQUARE:], keys, None) or []) == 1


def test_too_many_pieces_are_none() -> None:
    def block(documents: int) -> list[Piece] | None:
        where = np.arange(4 * documents)
        return cut(parse("documents=" + ",".join(["4"] * documents)), where, where)

    assert len(block(MOST_PIECES) or []) == MOST_PIECES
    assert block(MOST_PIECES + 1) is None


def test_keys_of_which_cudnn_may_make_nan() -> None:
    assert [keys for keys in range(400) if may_overflow(keys)] == [64, 192, 320]
