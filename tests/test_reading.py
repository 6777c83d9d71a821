"""Files and sizes that are too much: devices that never end, cases that no memory holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpiattn import InputError
from mpiattn.commands.generate import command as generate
from mpiattn.conformance.case import Case, problem
from mpiattn.machines.reading import content
from mpiattn.models.folder import read_json
from mpiattn.models.plan import Plan
from mpiattn.trace import file as trace

ZERO = Path("/dev/zero")


@pytest.mark.parametrize("read", [content, Plan.from_toml, read_json, trace.read])
def test_a_device_that_never_ends(read: Callable[[Path], Any]) -> None:
    with pytest.raises(ValueError, match="/dev/zero is a device, not a file"):
        read(ZERO)


def test_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a device"):
        generate.text(argparse.Namespace(prompt=None, prompt_file=ZERO))
    (tmp_path / "prompt").write_bytes("é\r\nb".encode())
    assert generate.text(argparse.Namespace(prompt=None, prompt_file=tmp_path / "prompt")) == "é\nb"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens=-1", "tokens of a case is at least 0, got -1"),
        ("heads=0", "heads of a case is at least 1, got 0"),
        ("head_dim=0", "head_dim of a case is at least 1, got 0"),
        ("kv_heads=3", "must be a multiple of kv_heads 3"),
        ("seed=-1", "seed of a case is at least 0, got -1"),
        ("dtype=int8", "unknown dtype 'int8'"),
        ("mask=caual", "unknown mask 'caual'"),
        ("tokens=99999999999999", "bytes, and this machine has"),
    ],
)
def test_cases_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        problem(Case.parse(text))


def test_truth_is_spelt() -> None:
    assert Case.parse("sinks=True scalars=False") == Case(sinks=True)
    with pytest.raises(argparse.ArgumentTypeError, match="scalars is True or False, got 'maybe'"):
        Case.parse("scalars=maybe")
    with pytest.raises(argparse.ArgumentTypeError, match=r"tokens is a number \(int\), got 'many'"):
        Case.parse("tokens=many")
