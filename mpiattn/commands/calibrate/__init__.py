"""The machine at hand, measured: what stands in its description.

- `links`: latency and bandwidth of messages, what it takes to post one, and up to which size it leaves at once
- `blocks`: the kernel's rate by the size of a block
- `passes`: copies in memory, and what it takes to start a pass over arrays
- `rounds`: how the time of the last two is taken
- `command`: `mpiattn calibrate`
"""
