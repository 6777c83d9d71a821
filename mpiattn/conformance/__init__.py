"""Whether an implementation of attention is right, to the last byte.

- `oracle`: textbook attention in float64
- `case`: a matrix of problems, and what the oracle makes of each
- `check`: one of them on all ranks
"""
