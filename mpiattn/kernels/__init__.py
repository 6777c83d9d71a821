"""Block attention of one rank, forward and backward; no MPI."""
