"""The kernel that computes NumPy's arrays by torch's flash attention for CPUs."""
