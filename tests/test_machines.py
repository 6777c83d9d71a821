"""Descriptions of machines: read, written, refused, and rates between the sizes given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpiattn import machines
from mpiattn.errors import InputError
from mpiattn.machines.machine import Rates
from mpiattn.models.plan import Plan

TEXT = """
name = "small"
ranks_per_node = 2
memory = 1e9
memory_bandwidth = 1e10
[links.network]
latency = 1e-5
bandwidth = 1e9
[compute.float32]
tokens = [128, 1024]
forward = [1e10, 2e10]
backward = [1e10, 2e10]
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory = 1e9", "memory = -1", "line 4: memory must be more than zero, not -1"),
        ("memory = 1e9", "memory = inf", "line 4: memory must be a finite number, not inf"),
        ("bandwidth = 1e9", "bandwidth = 0", "line 8: links.network.bandwidth must be more than zero, not 0"),
        ("latency = 1e-5", "latency = 'x'", "line 7: links.network.latency must be a number, not 'x'"),
        ("latency = 1e-5", "latncy = 1e-5", "line 6: links.network.latency is missing"),
        ("latency = 1e-5", "latency = 1e-5\nspeed = 3", "line 8: links.network.speed is not a key"),
        ("forward = [1e10, 2e10]", "forward = [1e10]", "compute.float32.forward must have 2 numbers"),
        ("tokens = [128, 1024]", "tokens = [1024, 128]", "line 10: compute.float32.tokens must ascend"),
        ("ranks_per_node = 2", "ranks_per_node = 2.5", "line 3: ranks_per_node must be a whole number"),
        ('name = "small"', "name = ", "line 2"),
        ("[links.network]", "[links.wire]", "links.network must be a table"),
        ("memory = 1e9", "progress = 1\nmemory = 1e9", "line 4: progress must be true or false, not 1"),
    ],
)
def test_a_damaged_machine_file_is_refused(old: str, new: str, message: str) -> None:
    assert machines.parse(TEXT).name == "small"
    with pytest.raises(InputError, match="machine") as error:
        machines.parse(TEXT.replace(old, new, 1))
    assert message in str(error.value)


@pytest.mark.parametrize("name", machines.presets())
def test_presets_load_and_survive_a_round_trip(name: str, tmp_path: Any) -> None:
    preset = machines.load(name)
    assert preset.source
    machines.write(preset, tmp_path / "copy.toml")
    assert machines.load(str(tmp_path / "copy.toml")) == preset


def test_an_unknown_machine_is_told_which_there_are() -> None:
    with pytest.raises(InputError, match=r"no machine 'abacus'.*a100-ib.*laptop"):
        machines.load("abacus")


def test_rates_between_and_beyond_the_sizes_given() -> None:
    rates = Rates((100, 400), (1.0, 4.0), (2.0, 8.0))
    assert [rates.at(size, False) for size in (1, 100, 200, 400, 9999)] == pytest.approx([1, 1, 2, 4, 4])
    assert rates.at(200, True) == pytest.approx(4)


def test_a_file_of_too_many_brackets(tmp_path: Path) -> None:
    file = tmp_path / "deep.toml"
    file.write_text("a = " + "[" * 100_000)
    for read in (machines.load, lambda name: Plan.from_toml(Path(name))):
        with pytest.raises(InputError, match=r"deep\.toml"):
            read(str(file))
