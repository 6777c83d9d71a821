"""The order of messages and blocks in one rank's Mesh-Attention tile (arXiv 2512.20968), without MPI.

- `steps`: what a schedule consists of, and the time that it takes
- `search`: the orders of messages that are tried
- `fill`: the blocks of each step, for one order of messages
- `tile`: the schedule of a problem, and the blocks that its mask leaves
"""
