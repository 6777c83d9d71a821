"""Traces: what each rank computed, sent, received and waited for, recorded.

- `events`: one of these, and all of a rank
- `comm`, `request`, `window`, `kernel`: what records them, in place of a communicator, a request, ...
- `mpi_comm`, `mpi_request`: the same as MPI's own classes, for any mpi4py program; `mpi_calls`: which calls are counted
- `buffers`: the bytes of a message
- `watch`: who waits for whom, when ranks are stuck
- `clocks`, `file`: the events of all ranks on one clock, in one file
"""
