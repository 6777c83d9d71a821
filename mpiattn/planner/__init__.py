"""Which algorithm, and which grid, on which cluster: candidates run in virtual time, the fastest first.

- `task`, `candidates`: what is to be planned, and what can be chosen
- `estimate`: roughly how long a candidate takes, and what it holds
- `simulate`: one candidate in virtual time
- `search`: which are run, and their order
- `choice`: the best for a communicator, agreed on by its ranks
- `units`: numbers as people write them
"""

from .candidates import Candidate, candidates, tile
from .choice import Choice, auto, choose
from .search import Ranking, plan
from .simulate import Outcome, simulate
from .task import Task

__all__ = [
    "Candidate",
    "Choice",
    "Outcome",
    "Ranking",
    "Task",
    "auto",
    "candidates",
    "choose",
    "plan",
    "simulate",
    "tile",
]
