"""Block attention on one rank by cuDNN, through NVIDIA's Python frontend, on CuPy arrays.

Each module uses those above it only:

- `library`: whether cuDNN is there, and which problems it can do
- `pieces`: a block, cut into rectangles that cuDNN can do
- `scratch`: memory that serves all calls in turn
- `plans`: cuDNN's graphs for a piece of some shapes
- `waiting`: sums whose shares wait, to be added up in one pass
- `calls`: what computes a piece
- `kernel`: the attention of a block
"""
