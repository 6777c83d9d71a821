"""What goes over a communicator.

- `message`: the methods asked of a communicator, tags, waiting
- `parcel`: several arrays in one message
- `reduction`: sums over the ranks by plain messages
- `hosts`: which ranks share a host, and its GPUs
- `device`: messages between GPUs
"""
