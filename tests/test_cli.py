"""The command line as a user meets it: under mpiexec, from help to a rank that is killed."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import inherited, mpiexec
from safetensors.numpy import load_file, save_file

from mpiattn.commands import cli
from mpiattn.commands.compare import command as compare
from mpiattn.conformance import oracle
from mpiattn.problems.mask import Causal

SMALL = ("--tokens", "37", "--heads", "4", "--kv-heads", "2", "--head-dim", "8")
KEYS = {
    "algorithm", "grid", "layout", "mask", "forward_seconds", "backward_seconds", "forward_wait_seconds",
    "backward_wait_seconds", "forward_bytes_received", "backward_bytes_received", "forward_messages_received",
    "backward_messages_received", "peak_bytes", "formula_peak_bytes", "error_out", "error_d_q", "error_d_k",
    "error_d_v", "ok",
}  # fmt: skip


def mpiattn(n: int, *arguments: str | Path, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    return mpiexec(n, sys.executable, "-m", "mpiattn", *arguments, timeout=timeout)


def test_compare(tmp_path: Path) -> None:
    chosen = ("--algorithms", "ring,mesh", "--grid", "2x3", "--mask", "causal", "--layout", "zigzag")
    files = ("--json", tmp_path / "c.json", "--plot", tmp_path / "c.png")
    done = mpiattn(6, "compare", *chosen, *files, "--tokens", "101")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  ok\n") == 2 and "WRONG" not in done.stdout
    document = json.loads((tmp_path / "c.json").read_text())
    assert set(document) == {"environment", "input", "options", "results"} and document["options"] == {"mask": "causal"}
    assert [(r["algorithm"], r["grid"]) for r in document["results"]] == [("ring", "6"), ("mesh", "2x3")]
    for result in document["results"]:
        assert set(result) >= KEYS and result["ok"] and result["error_out"] < 2e-5
        for key in KEYS:
            if key.endswith(("wait_seconds", "received", "peak_bytes")):
                assert len(result[key]) == 6
        assert all(
            0 < formula < peak for formula, peak in zip(result["formula_peak_bytes"], result["peak_bytes"], strict=True)
        )
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"


def test_compare_says_what_was_asked_for(tmp_path: Path) -> None:
    features = ("--sinks", "--dropout", "0.2", "--softcap", "5", "--scale", "0.3", "--partials", "narrow")
    chosen = ("--algorithms", "ring", "--layout", "zigzag", "--tokens", "64", "--seed", "3")
    done = mpiattn(1, "compare", *chosen, *features, "--json", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    said = "scale 0.3, softcap 5.0, partials narrow, sinks, dropout 0.2, seed 3"
    assert said in done.stdout.replace("\n", " ")
    options = json.loads((tmp_path / "c.json").read_text())["options"]
    assert options == {
        "mask": "causal", "scale": 0.3, "softcap": 5.0, "partials": "narrow", "sinks": True, "dropout": 0.2, "seed": 3,
    }  # fmt: skip


def test_compare_on_the_sample_checks_a_sample_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    given, queries = compare.load(parser.parse_args([]))
    assert given.q.shape == (1, 9, 2048, 64) and given.k.shape == (1, 3, 2048, 64) and queries is None
    monkeypatch.setattr(compare, "ORACLE_SCORES", 9 * 2048 * 20)
    given, queries = compare.load(parser.parse_args([]))
    assert queries is not None and len(queries) == 20
    others = np.setdiff1d(np.arange(2048), queries)
    assert not given.d_out[:, :, others].any() and given.d_out[:, :, queries].all()


@pytest.mark.parametrize(
    ("suffix", "algorithm"),
    [(".npz", "ring"), (".safetensors", "mesh"), (".npz", "tensor_parallel"), (".npz", "decode")],
)
def test_run(tmp_path: Path, suffix: str, algorithm: str) -> None:
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal((1, 2, 23, 4)) for name in ("q", "k", "v", "d_out")}
    given, output = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    (save_file(arrays, given) if suffix == ".safetensors" else np.savez(given, **arrays))  # type: ignore[arg-type]
    done = mpiattn(3, "run", "--algorithm", algorithm, "--qkv", given, "--backward", "--output", output)
    assert done.returncode == 0, done.stderr
    results = dict(load_file(output) if suffix == ".safetensors" else np.load(output))
    out, lse = oracle.attention(arrays["q"], arrays["k"], arrays["v"], Causal())
    d_q, d_k, d_v = oracle.gradients(arrays["q"], arrays["k"], arrays["v"], arrays["d_out"], Causal())
    for name, right in {"out": out, "lse": lse, "d_q": d_q, "d_k": d_k, "d_v": d_v}.items():
        assert oracle.error(results[name], right) < 1e-10


@pytest.mark.any_mpi
def test_features() -> None:
    features = ("--softcap", "2", "--sinks", "--dropout", "0.3")
    done = mpiattn(3, "compare", "--layout", "zigzag", "--iterations", "1", *SMALL, *features)
    assert done.returncode == 0 and "  ok" in done.stdout, (done.stdout, done.stderr)


@pytest.mark.any_mpi
def test_conformance_of_a_variant() -> None:
    case = "dropout=0.5 sinks=True mask=window=3,0"
    done = mpiattn(2, "conformance", "--algorithms", "mesh rows=1,decode", "--case", case)
    assert done.returncode == 0 and done.stdout.startswith("4 passed, 0 failed on 2 ranks"), (done.stdout, done.stderr)


@pytest.mark.any_mpi
def test_shares_of_conformance_are_all_of_it() -> None:
    counts = []
    for share in ("1/1", "1/3", "2/3", "3/3"):
        done = mpiattn(1, "conformance", "--algorithms", "ring", "--virtual", "2", "--share", share)
        assert done.returncode == 0, (done.stdout, done.stderr)
        counts.append(int(done.stdout.split()[0]))
    assert counts[0] == sum(counts[1:]) and min(counts) > 0


@pytest.mark.any_mpi
def test_bench_error(tmp_path: Path) -> None:
    """As many ranks as there are, then virtual ones, and the same bits on both."""
    files = ("--json", tmp_path / "e.json", "--plot", tmp_path / "e.png")
    done = mpiattn(2, "bench", "error", "--tokens", "60", "--virtual", "2,5", *files)
    assert done.returncode in (0, 1), done.stderr  # so few tokens don't average out
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    assert [r["ranks"] for r in results] == [1, 2, 2, 5] * 6
    for _, real, virtual, _ in zip(*[iter(results)] * 4, strict=True):
        assert real["rms"] == virtual["rms"] and virtual["virtual"]
    assert (tmp_path / "e.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.any_mpi
def test_bench_attention() -> None:
    """Also of decode, whose queries are the same on all ranks."""
    sizes = ("--tokens", "16", "--heads", "2", "--head-dim", "8", "--rounds", "1")
    done = mpiattn(2, "bench", "attention", "--algorithms", "ring,decode,mesh:2x1", *sizes)
    assert done.returncode == 0, done.stderr
    assert all(f"\n{name} without messages " in done.stdout for name in ("ring", "decode", "mesh:2x1"))
    assert "x torch" not in done.stdout and "No room" not in done.stdout  # where torch is not measured


def test_help_appears_once() -> None:
    done = mpiattn(3, "compare", "--help")
    assert done.returncode == 0 and done.stdout.count("usage: mpiattn compare") == 1


damaged = b"PK\x03\x04 this is no archive"


@pytest.mark.mpi(sizes=[2])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--algorithms", "ring,spiral"), "unknown algorithm spiral: choose from"),
        (("compare", "--layout", "spiral"), "invalid choice: 'spiral'"),
        (("compare", "--grid", "9x9"), "no mesh:9x9 on 2 ranks: choose from mesh:1x2, mesh:2x1"),
        (("compare", "--grid", "two"), "a grid is ROWSxCOLS, such as 2x3, got 'two'"),
        (("compare", "--mask", "casual"), "unknown mask 'casual'"),
        (("compare", "--mask", "window=3.5"), "unknown mask 'window=3.5': '3.5' is no whole number; choose from"),
        (("compare", "--mask", "window=-1"), "a window reaches 0 or more tokens each way"),
        (
            ("compare", "--mask", "documents=10,10", "--tokens", "64"),
            "the documents hold 20 tokens, the sequence has 64",
        ),
        (("run", "--mask", "documents=0,9,64", "--tokens", "64", "--output", "o.npz"), "cumulative lengths; Documents"),
        (("conformance", "--algorithms", "ring", "--case", "mask=documents=10,10"), "the documents hold 20 tokens"),
        (("compare", "--qkv", "missing.npz"), "missing.npz: no such file"),
        (("compare", "--qkv", "damaged.npz"), "is damaged"),
        (("compare", "--qkv", "damaged.safetensors"), "is damaged"),
        (("compare", "--qkv", "k_only.npz"), "has k, but no q, v"),
        (("compare", "--qkv", "k_only.npz", "--tokens", "7"), "exclude each other"),
        (("compare", "--heads", "4", "--kv-heads", "3"), "--heads 4 must be a multiple of --kv-heads 3"),
        (("compare", "--iterations", "0"), "--iterations is at least 1"),
        (("compare", "--softcap", "0"), "a softcap is a number above 0, got 0.0"),
        (("compare", "--dropout", "1"), "a dropout rate is 0 or more and less than 1, got 1.0"),
        (("conformance", "--algorithms", "mesh rows=9"), "on 2 ranks: choose from mesh:1x2, mesh:2x1"),
        (("conformance", "--share", "0/4"), "'0/4' is no share: 1/4, 2/4, 3/4 or 4/4, for example"),
        (("bench", "error", "--tokens", "4000"), "--tokens is from 1 to 2048"),
        (("bench", "attention", "--tokens", "many"), "'many' is no number of tokens"),
        (("bench", "attention", "--dtype", "int8"), "unknown dtype 'int8': choose from"),
        (("bench", "attention", "--rounds", "0"), "--rounds are at least 1"),
        (("bench", "attention", "--json", "no/such/folder.json"), "no such folder"),
        (("bench", "attention", "--algorithms", "mesh:two"), "a grid is ROWSxCOLS"),
        (("bench", "attention", "--algorithms", "ring:1x2"), "ring has no grid"),
        (("bench", "train", "--algorithms", "tensor_parallel"), "tensor_parallel does not share out tokens"),
        (("bench", "train", "--config", "small.toml", "--tokens", "64"), "--config and --tokens exclude each other"),
        (("bench", "train", "--machine", "a100-ib"), "no rates for float32"),
        (("compare", "--json", "no/such/folder.json", *SMALL), "no such folder"),
        (("env", "--json", "no/such/folder.json"), "no such folder"),
        (("schedule", "2x2", "--plot", "no/such/folder.png"), "no such folder"),
        (("trace", "trace.json", "--plot", "no/such/folder.png"), "no such folder"),
        (("run", "--output", "out.txt", *SMALL), "must end in .npz or .safetensors"),
        (("run", "--algorithm", "ring", "--grid", "1x2", "--output", "o.npz"), "--grid does not go with ring"),
        (("run", *SMALL), "the following arguments are required: --output"),
        (("spin",), "invalid choice: 'spin'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_command_lines(
    comm: Any, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    """In ranks that are there already: a start for each of the many would take minutes."""
    monkeypatch.chdir(mpi_tmp_path)
    if comm.rank == 0:
        for name in ("damaged.npz", "damaged.safetensors"):
            Path(name).write_bytes(damaged)
        np.savez("k_only.npz", k=np.zeros((1, 1, 2, 2)))
    comm.Barrier()
    heeded = signal.getsignal(signal.SIGINT)
    status = cli.main(arguments)
    signal.signal(signal.SIGINT, heeded)
    said = "".join(comm.allgather(capsys.readouterr().err))
    assert max(comm.allgather(status)) == 2, said  # which mpiexec hands on
    assert said.count(message) == 1 and said.count("error:") == 1, said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--algorithms", "ring,spiral"), "unknown algorithm spiral: choose from"),
        (("compare", "--qkv", "missing.npz"), "missing.npz: no such file"),
        (("spin",), "invalid choice: 'spin'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_status_of_wrong_command_lines(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    start = time.monotonic()
    done = mpiexec(2, sys.executable, "-m", "mpiattn", *arguments, cwd=tmp_path, timeout=60)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.count(message) == 1 and done.stderr.count("error:") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("scale", "dtype"), [("1e4", "float32"), ("1e6", "float64"), ("1e6", "bfloat16")])
@pytest.mark.any_mpi
def test_large_scores_are_ok(scale: str, dtype: str) -> None:
    """Where dQ and dK are all but 0, and what is left is the rounding of their terms."""
    words = ("--tokens", "64", "--heads", "2", "--layout", "zigzag", "--iterations", "1")
    done = mpiattn(2, "compare", "--algorithms", "ring,dense", "--scale", scale, "--dtype", dtype, *words)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout


@pytest.mark.any_mpi
def test_infinity_is_reported(tmp_path: Path) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 20, 4))
    v[0, 0, 3, 1] = np.inf
    np.savez(tmp_path / "inf.npz", q=q, k=k, v=v)
    done = mpiattn(2, "compare", "--algorithms", "ring", "--layout", "zigzag", "--qkv", tmp_path / "inf.npz")
    assert done.returncode == 1 and "Warning" not in done.stderr
    assert "The input has 1 infinite numbers in v" in done.stdout


@pytest.mark.any_mpi
def test_nan_is_reported(tmp_path: Path) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 20, 4))
    q[0, 0, 3, 1] = np.nan
    np.savez(tmp_path / "nan.npz", q=q, k=k, v=v)
    words = ("--algorithms", "ring", "--layout", "zigzag", "--qkv", tmp_path / "nan.npz", "--json", tmp_path / "a.json")
    done = mpiattn(2, "compare", *words)
    assert done.returncode == 1
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text and json.loads(text)["results"][0]["error_out"] is None
    assert "The input has 1 NaN in q" in done.stdout and "nan" in done.stdout and "WRONG" in done.stdout


@pytest.mark.any_mpi
def test_a_mismatch_is_found(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "from mpiattn.algorithms.ring import RingAttention\n"
        "from mpiattn.commands.cli import main\n"
        "whole = RingAttention.attend\n"
        "def attend(self, problem, q, k, v):\n"
        "    out, lse = whole(self, problem, q, k, v)\n"
        "    out[:, 0, :1] += 1e-3 * (self.rank == 1)\n"
        "    return out, lse\n"
        "RingAttention.attend = attend\n"
        "sys.exit(main())\n"
    )
    done = mpiexec(2, sys.executable, script, "compare", "--algorithms", "ring,dense", "--layout", "striped", *SMALL)
    assert done.returncode == 1 and done.stdout.count("WRONG") == 1 and done.stdout.count("  ok\n") == 1, done.stdout


FAILING = """
import os, signal, sys
from mpi4py import MPI
from mpiattn.algorithms.mesh import MeshAttention
from mpiattn.commands.cli import main
whole = MeshAttention.attend
def attend(self, *arguments):
    if MPI.COMM_WORLD.rank == 1:
        {fail}
    return whole(self, *arguments)
MeshAttention.attend = attend
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("raise RuntimeError('disk on fire')", "RuntimeError: disk on fire"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ""),
    ],
    ids=["exception", "killed"],
)
def test_a_rank_that_dies_ends_the_job(tmp_path: Path, fail: str, message: str) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(fail=fail))
    start = time.monotonic()
    done = mpiexec(3, sys.executable, script, "compare", "--algorithms", "mesh", *SMALL, timeout=60)
    assert done.returncode not in (0, 2) and message in done.stderr, done.stderr
    assert time.monotonic() - start < 30


@pytest.mark.any_mpi
def test_without_an_mpi_library(tmp_path: Path) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("")
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-m", "mpiattn"]
    done = subprocess.run([*command, "schedule", "2x2"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 x 2" in done.stdout, done.stderr
    done = subprocess.run([*command, "compare"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no MPI library found" in done.stderr


@pytest.mark.any_mpi
def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "mpiattn", "schedule", "120x120"]  # more than a pipe holds
    with subprocess.Popen(
        command, env=inherited(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("Mesh-Attention")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
