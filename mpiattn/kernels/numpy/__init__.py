"""Block attention on one rank in NumPy: forward and backward of some queries against some keys.

Tiled as in FlashAttention-2 (Dao 2023, arXiv 2307.08691), so that memory grows with the tokens and not
with their square, and arranged for what costs time in NumPy, where every elementwise operation is a
pass over the tile of its own:

- Scores are kept in units of log2, because exp2 takes half the time of exp.
- The score tile is transposed, (keys, queries): what belongs to a query, such as its maximum, is then a
  row vector, reduced and broadcast along contiguous memory.
- What would be added to or summed from a tile travels in the matrix products instead. Keys and values
  carry a column of ones. Against it, the query tile's last row holds minus the shift of the softmax,
  that of d_out holds minus delta, and the product with the values yields the sum of each query's weights.
- No maximum is taken where the norms of queries and keys prove that exp2 can't overflow.

Where these norms allow scores so large that the accumulators' dtype does not know them well, all of a block's head
is computed in float64, and beyond that its scores in slices, which are the same bits forward and backward: else a
probability could be anything backward. Its scores are natural ones then, and a shift is subtracted after the product.

A logit softcap follows the product of a score tile, so the shift is added after it and not within the
product. Dropout follows `exp2`: weights are summed before it, and minus delta is added after it.

Each module uses those above it only:

- `tiles`: which tiles of a block are computed
- `work`: the arrays of a tile, and matrix products of them
- `slices`: matrix products whose bits don't depend on their shapes
- `scores`: from scores to the weights of the softmax
- `kernel`: the attention of a block
"""
