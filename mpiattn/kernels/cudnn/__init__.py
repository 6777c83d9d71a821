"""Block attention on one rank by cuDNN, through NVIDIA's Python frontend, on CuPy arrays.

Each module uses those above it only:

- `library`: whether cuDNN is there, and which problems it can do
- `plans`: cuDNN's graphs for a piece of some shapes
- `kernel`: the attention of a block
"""
