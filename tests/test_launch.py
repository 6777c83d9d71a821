"""Starts of mpiexec that fail before a rank runs, by tests and by run/test.sh: with a launcher that only says so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import launch
import pytest

TIER = Path(__file__).parent.parent / "run" / "tier.sh"
SAID = "-----\\n%s. We cannot\\ncontinue.\\n-----"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launcher that fails as often as its last argument says, and writes its folder for files into `starts`."""
    path = tmp_path / "mpiexec"
    path.write_text(
        f"""#!/bin/bash
echo "$PRTE_MCA_prte_tmpdir_base" >>{tmp_path}/starts
if (($(wc -l <{tmp_path}/starts) > ${{@: -1}})); then echo ran; exit; fi
printf -- '{SAID % "%s"}\\n' "$SAYS" >&2
exit 213
"""
    )
    path.chmod(0o755)
    monkeypatch.setattr(launch, "mpiexec_path", lambda: str(path))
    monkeypatch.setenv("SAYS", launch.NOT_STARTED)
    return path


def starts(fake: Path) -> list[str]:
    return (fake.parent / "starts").read_text().splitlines()


@pytest.mark.parametrize(("failures", "wanted"), [(0, 1), (1, 2), (2, 3), (3, 3)])
def test_of_a_test(fake: Path, failures: int, wanted: int) -> None:
    done = launch.mpiexec(2, str(failures))
    assert len(starts(fake)) == len(set(starts(fake))) == wanted  # each has a folder of its own
    assert (done.returncode, done.stdout) == ((0, "ran\n") if failures < 3 else (213, ""))


@pytest.mark.parametrize(("failures", "wanted"), [(1, 2), (3, 3)])
def test_of_a_tier(fake: Path, failures: int, wanted: int) -> None:
    done = tier(fake, failures)
    assert len(starts(fake)) == wanted
    assert done.returncode == (failures == 3) and done.stdout.count("ran\n") == (failures < 3), done.stdout


def test_another_failure_is_final(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAYS", "There are not enough slots")
    assert launch.mpiexec(2, "1").returncode == 213 and len(starts(fake)) == 1
    assert tier(fake, 2).returncode == 1 and len(starts(fake)) == 2


def test_log_of_a_tier(tmp_path: Path) -> None:
    """What failed is printed again at the end, without dots and with long lines cut."""
    (tmp_path / "log").write_text("..sF.. [ 50%]\n.....  [100%]\n" + "F" * 400 + "\n1 failed\n")
    done = bash(f"tier one false; tier two sh -c 'cat {tmp_path}/log; exit 1'; summary")
    *_, one, two = done.stdout.split("===== FAILED: ")
    assert one == "one\n\n\n" and two.startswith(f"two\n{'F' * 300}\n1 failed\n") and "0 passed, 2 failed" in two
    assert "%]" not in done.stdout and done.returncode == 1


def tier(fake: Path, failures: int) -> subprocess.CompletedProcess[str]:
    return bash(f"tier ranks {fake} -n 2 {failures}; summary")


def bash(commands: str) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; source {TIER}; trap 'rm \"$log\"' EXIT; {commands}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)
