"""`mpiattn plan`: the table of candidates, and the curve over the number of ranks."""
