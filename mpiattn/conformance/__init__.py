"""Whether an implementation of attention is right, to the last byte.

- `oracle`: textbook attention in float64; `visible`, `dropped`: its masks and dropout
- `case`, `user_masks`: a matrix of problems, and what the oracle makes of each; `selection`: cases by their values
- `player`: an implementation, how it refuses a case, and what it received
- `turn`: one of them at one case on one rank; `check`: on all; `meeting`: how they learn what it came to
- `differences`, `explain`: where a result is wrong, and the block that explains it
"""
