"""The tables and figures of two documents on Mesh-Attention and Ring Attention, each beside what we get.

The documents are a Chinese article on Mesh-Attention (after arXiv 2512.20968) and a Chinese lab on Ring
Attention; `docs/documents.md` is about them. One module for each table, and

- `claims`: every number that they claim
- `setting`: what is simulated to compare with, and the one loop over devices
- `report`: a table, its notes and its figure, as files
- `command`: `mpiattn documents`
"""
