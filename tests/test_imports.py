"""The floor plan of the package: which room may import which, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mpiattn

ROOT = Path(mpiattn.__file__).parent

FLOORS = (
    ("mpiattn", "__main__"),
    ("commands",),
    ("planner", "conformance", "models", "torch", "pytest_plugin"),
    ("algorithms",),
    ("costs", "schedule"),
    ("virtual", "trace"),
    ("messages", "kernels"),
    ("problems", "machines"),
    ("arrays",),
    ("errors",),
)
"""Rooms of the package, from top to bottom: a module imports from its own floor and from those below."""

WITHOUT_MPI = ("problems", "machines", "costs", "schedule")
"""Rooms that do not name mpi4py, not even in a function."""

UPWARD = {
    ("commands.cli", "mpiattn"),  # __version__
    ("commands.env.environment", "mpiattn"),  # __version__
    ("trace.file", "commands.trace.report"),
}
"""Imports upward that are known, and to be removed."""

CIRCULAR = {
    ("trace.comm", "trace.mpi_comm"),
}
"""Imports that close a circle and are known; without them there is none."""

MOST_ENTRIES = 20
MOST_ANY = 250


@cache
def modules() -> dict[str, Path]:
    """Return the file of each module, by its name within the package; the package itself is "mpiattn"."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "mpiattn"] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Return which modules of the package each of them imports, in functions and for type checkers too."""
    return {name: set(imported(name, path)) - {name} for name, path in modules().items()}


def imported(name: str, path: Path) -> Iterator[str]:
    """Yield what one module imports of the package."""
    package = ("mpiattn." + name if name != "mpiattn" else name).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            origin = base if node.level else str(node.module)
            targets = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "mpiattn":
                inner = target.removeprefix("mpiattn").removeprefix(".")
                parent = inner.rpartition(".")[0]  # where the target is a name in a module
                yield next(module for module in (inner, parent, "mpiattn") if module in modules())


def room(module: str) -> str:
    """Return the room in which a module stands: the first part of its name."""
    return module.split(".")[0]


def floor(module: str) -> int:
    """Return on which floor a module stands, counted from the top."""
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Return a circle of arrows, an empty list where there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_rooms() -> None:
    """Few rooms, each on a floor."""
    entries = [*ROOT.glob("*.*"), *ROOT.glob("*/__init__.py")]  # not what is left of a room: a folder of bytecode
    assert len(entries) <= MOST_ENTRIES
    assert {room(module) for module in modules()} <= {name for rooms in FLOORS for name in rooms}


def test_no_import_upward() -> None:
    upward = {(one, other) for one, others in imports().items() for other in others if floor(other) < floor(one)}
    assert upward - UPWARD == set()
    assert UPWARD - upward == set(), "known no longer: take it from the list"


def test_no_circle() -> None:
    """Neither between modules nor between rooms."""
    gone = {(one, other) for one, other in CIRCULAR if other not in imports().get(one, set())}
    assert gone == set(), "known no longer: take it from the list"
    arrows = {one: {other for other in others if (one, other) not in CIRCULAR} for one, others in imports().items()}
    assert circle(arrows) == []
    for known in CIRCULAR:
        assert circle({**arrows, known[0]: arrows[known[0]] | {known[1]}}), f"{known} closes no circle"
    rooms: dict[str, set[str]] = {}
    for one, others in imports().items():
        below = {room(other) for other in others if (one, other) not in UPWARD}
        rooms[room(one)] = rooms.get(room(one), set()) | below - {room(one)}
    assert circle(rooms) == []


def test_rooms_without_mpi() -> None:
    for name, path in modules().items():
        if room(name) in WITHOUT_MPI:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                    assert not any(module.split(".")[0] == "mpi4py" for module in named), name
    names = [f"mpiattn.{name}" for name in modules() if room(name) in WITHOUT_MPI]
    code = f"import sys; sys.modules['mpi4py'] = None\nfor name in {names}: __import__(name)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_checks_see_an_arrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import upward, and one that closes a circle, are found."""
    assert "messages.message" in imports()["algorithms.ring"]
    assert "arrays" in imports()["algorithms.ring"] and "mpiattn" not in imports()["algorithms.ring"]
    assert floor("errors") > floor("algorithms.ring") > floor("commands.cli") > floor("mpiattn")
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle({"a": {"b", "c"}, "b": {"c"}})


def count_any(signature: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how often the word Any stands in the types of one function's arguments and result."""
    a = signature.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    types = [*(argument.annotation for argument in arguments), signature.returns]
    return sum(isinstance(n, ast.Name) and n.id == "Any" for kind in types if kind for n in ast.walk(kind))


def test_any_in_signatures() -> None:
    """Count the word Any in the annotations of arguments and results, of methods and inner functions too."""
    counts = {
        name: sum(
            count_any(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        for name, path in modules().items()
    }
    worst = sorted(counts, key=lambda name: -counts[name])[:20]
    assert sum(counts.values()) < MOST_ANY, {name: counts[name] for name in worst}
