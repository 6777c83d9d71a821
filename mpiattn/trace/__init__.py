"""Traces: what each rank computed, sent, received and waited for, recorded.

- `events`: one of these, and all of a rank
- `comm`, `request`, `kernel`: what records them, in place of a communicator, a request and a kernel
- `report`, `figure`: what they say, as text and as a picture
- `clocks`, `file`: the events of all ranks on one clock, in one file
- `command`: `mpiattn trace`
"""
