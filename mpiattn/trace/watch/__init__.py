"""A watch over the ranks: who waits for whom when they are stuck, and why.

In the ranks:

- `session`: `mpiattn.watch` itself
- `comm`: a communicator that leaves a record of each message and wait
- `request`: its requests
- `record`: these records, in a file that outlives the rank
- `wires`: what tells in which order ranks have ended

Attentions and their passes make themselves known in `messages.observer`.

In a process beside the ranks of each host, which loads no MPI:

- `monitor`, `host`, `watched`: what notices that something is wrong, on this host
- `network`, `others`: the same of the other hosts
- `alarm`: what they noticed
- `ended`: which of several that have ended was the first, as far as that is certain
- `state`, `graph`, `report`: what each rank does, who waits for whom, in words
- `timeline`: the last steps as a trace
"""
