"""Passes over rows of numbers for which CuPy has no fast function: fused kernels.

- `place`: where an array lies in memory
- `passes`: the passes of `fused.cu`, compiled and queued
- `rows`: copies, sums, roundings and merges of rows
"""
