"""Files of queries, keys and values: what is read of them, what is refused, and in which order axes are taken."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from launch import mpiexec
from safetensors.numpy import load_file, save_file

from mpiattn import InputError, machines, virtual
from mpiattn.commands import inputs
from mpiattn.commands.root import on_root
from mpiattn.conformance import oracle
from mpiattn.problems.mask import Causal

SHAPE = (1, 2, 23, 4)


def arrays(names: str = "qkv", shape: tuple[int, ...] = SHAPE, dtype: Any = "float64") -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(dtype) for name in names}


def load(path: Path, *words: str, backward: bool = True) -> inputs.Inputs:
    parser = argparse.ArgumentParser()
    inputs.add_arguments(parser)
    parser.set_defaults(mask=Causal())
    return inputs.load(parser.parse_args(["--qkv", str(path), *words]), backward)


def refused(path: Path, message: str, *words: str, backward: bool = True) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(path, *words, backward=backward)


def test_what_else_a_file_holds_is_not_read(tmp_path: Path) -> None:
    """Python's objects in an .npz, and numbers of 8 bits in a .safetensors."""
    good = arrays()
    npz, tensors = tmp_path / "a.npz", tmp_path / "a.safetensors"
    np.savez(npz, **good, notes=np.array([{"a": 1}, None], dtype=object), d_out=np.array([None], dtype=object))
    save_file({**good, "scale": np.ones(3, ml_dtypes.float8_e4m3fn)}, tensors)
    for path in (npz, tensors):
        assert all(np.array_equal(getattr(load(path, backward=False), name), good[name]) for name in "qkv")
    refused(npz, "d_out is an array of Python objects; it must be an array of float64")


def test_what_is_asked_for_and_no_array_of_numbers_is_named(tmp_path: Path) -> None:
    good = arrays()
    np.savez(tmp_path / "a.npz", **{**good, "v": np.array([None])})
    refused(tmp_path / "a.npz", "v is an array of Python objects")
    save_file({**good, "k": np.ones(SHAPE, ml_dtypes.float8_e4m3fn)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "k is F8_E4M3; it must be an array of float64, float32, float16, bfloat16")
    np.savez(tmp_path / "b.npz", **{**good, "q": good["q"].astype(">f4")})
    refused(tmp_path / "b.npz", "q is >f4 (1, 2, 23, 4); it must have 4 axes (batch, heads, tokens, head_dim)")


def test_bfloat16(tmp_path: Path) -> None:
    good = arrays(dtype=ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", **good)
    save_file(good, tmp_path / "a.safetensors")
    for suffix in ("npz", "safetensors"):
        assert np.array_equal(load(tmp_path / f"a.{suffix}").q, good["q"])


def test_arrays_of_several_dtypes(tmp_path: Path) -> None:
    """Nothing is rounded without a word, and nothing becomes infinite with one."""
    good = arrays(dtype="float32")
    path = tmp_path / "a.npz"
    np.savez(path, q=good["q"].astype("float16"), k=good["k"].astype("float16"), v=1e6 * good["v"])
    refused(path, "they must have one dtype, got q float16, k float16, v float32; --dtype converts them")
    assert load(path, "--dtype", "float32").v.max() > 1e6
    refused(path, "v has numbers that are too large for float16", "--dtype", "float16")
    np.savez(path, **good, d_out=good["q"].astype("float64"))
    refused(path, "got q float32, k float32, v float32, d_out float64")


def test_a_gradient_of_another_length(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays(), d_out=np.zeros((1, 2, 22, 4)))
    assert load(path, backward=False).q.shape == SHAPE
    refused(path, "d_out is (1, 2, 22, 4), but out, as q and v have it, is (1, 2, 23, 4)")


def test_other_names(tmp_path: Path) -> None:
    good = arrays()
    path = tmp_path / "a.npz"
    np.savez(path, query=good["q"], key=good["k"], value=good["v"], grad=good["q"])
    refused(path, "has query, key, value, grad, but no q, k, v; --names Q,K,V says what they are called")
    given = load(path, "--names", "query,key,value,grad")
    assert np.array_equal(given.k, good["k"]) and np.array_equal(given.d_out, good["q"])
    assert not np.array_equal(load(path, "--names", "query,key,value").d_out, good["q"])
    for wrong in ("query,key", "q,q,v", "q,k,"):
        with pytest.raises(SystemExit):
            load(path, "--names", wrong)


def test_more_heads_than_tokens_are_doubted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = arrays(shape=(1, 512, 8, 64), dtype="float32")
    path = tmp_path / "a.npz"
    np.savez(path, **good)
    assert load(path).q.shape == (1, 512, 8, 64)
    warning = capsys.readouterr().err
    for part in ("512 heads of 8 tokens", "512 tokens with 8 heads", "--axes bthd"):
        assert warning.count(part) == 1
    assert np.array_equal(load(path, "--axes", "bthd").q, good["q"].swapaxes(1, 2))
    assert load(path, "--axes", "bhtd").q.shape == (1, 512, 8, 64)
    one = {**arrays("q", (1, 32, 1, 8)), **arrays("kv", (1, 8, 40, 8))}  # a new token against a cache
    np.savez(path, **one)
    load(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.any_mpi
def test_run_keeps_the_order_of_the_axes(tmp_path: Path, suffix: str) -> None:
    good = arrays("qkv") | {"d_out": arrays("o")["o"]}
    swapped = {name: np.ascontiguousarray(array.swapaxes(1, 2)) for name, array in good.items()}
    given, output = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    (save_file(swapped, given) if suffix == "safetensors" else np.savez(given, **swapped))  # type: ignore[arg-type]
    command = [sys.executable, "-m", "mpiattn", "run", "--qkv", str(given), "--axes", "bthd", "--backward"]
    done = mpiexec(2, *command, "--algorithm", "ring", "--output", output)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    results = dict(load_file(output) if suffix == "safetensors" else np.load(output))
    out, lse = oracle.attention(good["q"], good["k"], good["v"], Causal())
    gradients = oracle.gradients(good["q"], good["k"], good["v"], good["d_out"], Causal())
    for name, right in zip(("out", "d_q", "d_k", "d_v"), (out, *gradients), strict=True):
        assert oracle.error(results[name].swapaxes(1, 2), right) < 1e-10
    assert oracle.error(results["lse"], lse) < 1e-10


@pytest.mark.parametrize("option", [("--axes", "bthd"), ("--names", "a,b,c")])
@pytest.mark.any_mpi
def test_options_of_files_do_nothing_without_one(option: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "mpiattn", "compare", "--tokens", "8", *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and f"{option[0]} does nothing without --qkv" in done.stderr


def test_a_seed_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    np.savez(path, **arrays())
    refused(path, "--seed does nothing here", "--seed", "3", backward=False)
    load(path, "--seed", "3", "--sinks", backward=False)
    load(path, "--seed", "3")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (2, 2, 23, 4)}, "they must have one batch size"),
        ({"k": (2, 2, 23, 4), "v": (2, 2, 23, 4)}, "they must have one batch size"),
        ({"q": (1, 3, 23, 4)}, "a.npz: q is float64 (1, 3, 23, 4), k float64 (1, 2, 23, 4)"),
        ({"q": (1, 2, 23, 0), "k": (1, 2, 23, 0)}, "the same head_dim, at least 1"),
        ({"v": (1, 2, 22, 4)}, "k and v must have the same heads and tokens"),
    ],
)
def test_arrays_that_do_not_fit_together(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    """Found before the oracle is asked for what is right."""
    np.savez(tmp_path / "a.npz", **{**arrays(), **{name: np.zeros(shape) for name, shape in shapes.items()}})
    refused(tmp_path / "a.npz", message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "99999999999999999999"), "bytes, and this machine has"),
        (("--heads", "99999999999999"), "bytes, and this machine has"),
        (("--tokens", "8", "--batch", "2000000000"), "bytes, and this machine has"),
        (("--tokens", "8", "--seed", "-1"), "--seed is 0 or more, got -1"),
    ],
)
@pytest.mark.any_mpi
def test_random_input_that_is_not_to_be_had(words: tuple[str, ...], message: str) -> None:
    parser = argparse.ArgumentParser()
    inputs.add_arguments(parser)
    parser.set_defaults(mask=Causal())
    with pytest.raises(ValueError, match=re.escape(message)):
        inputs.load(parser.parse_args(words))


def test_memory_that_is_not_to_be_had() -> None:
    def work() -> None:
        raise MemoryError("Unable to allocate 1 PiB")

    with pytest.raises(InputError, match="Unable to allocate 1 PiB"):
        virtual.run(1, machines.load("laptop"), lambda comm: on_root(comm, work))
