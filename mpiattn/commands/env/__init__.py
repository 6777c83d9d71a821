"""Where the ranks run, with which software, and whether they get in each other's way.

- `environment`: all that there is to know of the ranks
- `warnings`: what is wrong with it
- `groups`: ranks that are alike, and how to name them
- `command`: `mpiattn env`
"""
