"""Messages over a communicator.

- `connection`: what an algorithm asks of the communicator that it is built on; `private`: its duplicate
- `observer`: the watch that is active, if one is; see `watch`
- `message`: the methods asked of a communicator, tags, waiting
- `parcel`: several arrays in one message
- `reduction`: sums over the ranks by plain messages
- `hosts`: which ranks share a host, and its GPUs
- `device`: messages between GPUs
- `ending`: the end of a job by one of its ranks
"""
