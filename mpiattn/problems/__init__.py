"""Problems of attention: integers only, without MPI and without a number of any array.

- `mask`: which keys each query attends to; `pairs`: how many pairs that leaves
- `layout`: which tokens each rank owns
- `problem`: sizes, dtype, layout and mask together; `kv_cache`: the same for decoding
- `grid`: grids of ranks; `travel`: how far a chunk goes
- `dropout`: which weights are dropped
"""
