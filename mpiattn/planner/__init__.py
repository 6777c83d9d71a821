"""Which algorithm, and which grid, on which cluster: candidates run in virtual time, the fastest first."""

from .candidates import Candidate, candidates, tile
from .choice import Choice, auto, choose
from .search import Plan, plan
from .simulate import Outcome, simulate
from .task import Task

__all__ = ["Candidate", "Choice", "Outcome", "Plan", "Task", "auto", "candidates", "choose", "plan", "simulate", "tile"]
