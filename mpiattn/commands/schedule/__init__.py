"""`mpiattn schedule`: a schedule as a table and as a picture."""
