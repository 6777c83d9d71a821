"""Exact distributed attention over MPI."""
