"""Block attention on one rank in plain CuPy.

Each module uses those above it only:

- `products`: matrix products of many heads at a time
- `bounds`: which keys each query of a block sees
- `tiles`: what of a block is computed at a time
- `kernel`: the attention of a block
"""
