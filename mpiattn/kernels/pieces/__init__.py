"""Block attention on one rank by a library's fused attention, on CuPy arrays: what the kernels cudnn and flash4 share.

Each module uses those above it only:

- `library`: whether a library's packages are there, and whether it takes a problem
- `cut`: a block, cut into rectangles that a library can do
- `scratch`: memory that serves all calls in turn
- `waiting`: sums whose shares wait, to be added up in one pass
- `calls`: what computes a piece, by a plan of the library's
- `kernel`: the attention of a block
"""
