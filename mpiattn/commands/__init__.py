"""The command line: one module or package for each subcommand, with its tables and figures.

- `cli`: the command line as a whole
- `bench`, `calibrate`, `compare`, `conformance`, `documents`, `env`, `plan`, `run`, `schedule`, `trace`
- `inputs`, `files`, `gpu`: what several of them take; `charts`, `progress`, `timing`, `root`: how they show it
"""
