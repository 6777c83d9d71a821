"""Options of commands that also run on GPUs, where there is none; and the launch lines of run/gpu.sh."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiattn.commands import cli, gpu
from mpiattn.errors import InputError

SCRIPT = Path(__file__).parents[1] / "run" / "gpu.sh"
COMMANDS = {
    "compare": [],
    "run": ["--output", "out.npz"],
    "conformance": [],
    "calibrate": ["--output", "here.toml"],
    "bench": ["attention"],
}


def parse(command: str, *words: str) -> Any:
    given = COMMANDS[command]
    first, rest = (given, []) if command == "bench" else ([], given)
    return cli.parser().parse_args([command, *first, *words, *rest])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_runs_on_gpus_has_the_options(command: str) -> None:
    args = parse(command, "--arrays", "cupy", "--kernel", "cudnn", "--gpu-messages", "host")
    assert gpu.options(args) == {"kernel": "cudnn", "gpu_messages": "host"}
    if command != "calibrate":
        assert gpu.options(parse(command, "--deterministic"))["deterministic"]
    with pytest.raises(SystemExit):
        parse(command, *(["--deterministic"] if command == "calibrate" else ["--kernel", "fast"]))


@pytest.mark.mpi
@pytest.mark.parametrize("command", COMMANDS)
def test_numpy_unless_gpus_are_asked_for(comm: Any, command: str) -> None:
    assert gpu.namespace(parse(command), comm) is np
    assert gpu.namespace(parse(command, "--kernel", "numpy"), comm, "cupy") is np
    assert gpu.namespace(parse(command, "--arrays", "numpy"), comm, "cupy") is np


@pytest.mark.mpi
@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
@pytest.mark.parametrize("words", ["--arrays cupy", "--kernel cupy", "--kernel cudnn", "--kernel flash4"])
def test_without_a_gpu_every_rank_says_what_to_install(comm: Any, words: str) -> None:
    for command in COMMANDS:
        with pytest.raises(
            InputError, match=r"rank 0 has no GPU: CuPy is not installed: pip install 'mpiattn\[cuda13\]'"
        ):
            gpu.namespace(parse(command, *words.split()), comm)


def test_virtual_ranks_have_no_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--virtual", "2", "--arrays", "cupy"]) == 2
    assert "virtual ranks have no GPUs" in capsys.readouterr().err


def line(*words: str) -> str:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout if done.returncode == 0 else done.stderr


def test_launch_lines() -> None:
    lines = {
        mpi: line("-n", "3", "--mpi", mpi, "--print", "echo", "it's") for mpi in ("openmpi", "mpich", "cray", "intel")
    }
    for mpi, text in lines.items():
        assert text.endswith("echo it\\'s \n"), (mpi, text)
    assert "mpiexec -n 3 --bind-to none --mca pml ucx" in lines["openmpi"]
    assert "UCX_RNDV_SCHEME=put_zcopy" in lines["openmpi"]
    assert "MPIR_CVAR_ENABLE_GPU=1 mpiexec -n 3 echo" in lines["mpich"]
    assert "MPICH_GPU_SUPPORT_ENABLED=1 srun --ntasks 3 --gpus-per-task 1 --gpu-bind none echo" in lines["cray"]
    assert "I_MPI_OFFLOAD=1 I_MPI_OFFLOAD_MODE=cuda mpiexec -n 3 echo" in lines["intel"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--mpi", "lam", "-n", "1", "true"], "openmpi, mpich, cray or intel, not lam"), (["-n", "2"], "which command")],
)
def test_a_wrong_launch_says_what_is_right(words: list[str], reason: str) -> None:
    assert reason in line(*words)
