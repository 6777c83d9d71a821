"""Messages between GPUs: communicators whose messages are posted when the device has come to them.

Work on a GPU is queued. A buffer is ready to be sent, or free to receive, once the device has done what was
queued before; to wait for that before a message would leave the device idle. So `DeviceComm` records an
event where the algorithm posts a message, lets the algorithm queue its next block, and hands the message to
MPI when the event has passed: in the `Testall` and `Waitall` that follow.

Where the MPI library takes device memory it is given just that. Else a message goes through the host's memory.

- `probe`: whether the MPI library takes device memory
- `pinned`, `staging`: the way through the host's memory
- `channel`: messages under way, and what the communicators of an algorithm share
- `comm`: the communicator; `algorithms.attach` makes an algorithm's communicators such ones

All this serves CuPy through the namespace that an array brings along; NumPy's arrays pass it untouched.
"""
