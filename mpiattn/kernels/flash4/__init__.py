"""Block attention on one rank by FlashAttention-4 (flash-attn-4, kernels in the CuTe DSL), on CuPy arrays.

Each module uses those above it only:

- `library`: whether FlashAttention-4 is there, and which problems it can do
- `memory`: arrays as the library takes them, and stand-ins without memory
- `launches`: what the library queues in a call, written down instead
- `plans`: that, queued again for other arrays of the same shapes
- `kernel`: the attention of a block
"""
