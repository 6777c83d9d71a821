"""Block attention on one rank in plain CuPy, and what CuPy arrays of rows need: passes over memory, fused.

Each module uses those above it only:

- `passes`: the passes of `fused.cu`, compiled and queued
- `rows`: copies, sums and roundings of rows
- `products`: matrix products of many heads at a time
- `bounds`: which keys each query of a block sees
- `tiles`: what of a block is computed at a time
- `kernel`: the attention of a block
"""
