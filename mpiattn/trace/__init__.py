"""Traces: what each rank computed, sent, received and waited for, recorded.

- `events`: one of these, and all of a rank
- `comm`, `request`, `window`, `kernel`: what records them, in place of a communicator, a request, ...
- `clocks`, `file`: the events of all ranks on one clock, in one file
"""
