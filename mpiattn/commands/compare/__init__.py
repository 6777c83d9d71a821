"""Algorithms side by side on the same input, each checked against the oracle.

- `case`: one algorithm, what is checked and measured of it
- `report`: what all ranks measured
- `command`: `mpiattn compare`
"""
