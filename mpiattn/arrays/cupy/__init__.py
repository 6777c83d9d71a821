"""What CuPy has no fast function for: passes over rows of numbers, fused.

- `passes`: the passes of `fused.cu`, compiled and queued
- `rows`: copies, sums, roundings and merges of rows
"""
