"""Models in CuPy: the same operations as in NumPy, which a double of CuPy shows on CPUs; on GPUs the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strict_cupy
from small_llama import llama, tokens
from test_training import TEXT, plan

from mpiattn import ALGORITHMS, Causal, RingAttention
from mpiattn.algorithms.sharing import SHARE_TOKENS
from mpiattn.arrays import Array, operations
from mpiattn.arrays.operations import on_host
from mpiattn.models import checkpoint, training
from mpiattn.models.attention_layer import AttentionLayer
from mpiattn.models.generation import Generator
from mpiattn.models.llama import Llama
from mpiattn.models.training import Trainer


def in_cupy(model: Llama, xp: Any) -> Llama:
    return Llama(model.config, {name: xp.asarray(weight) for name, weight in model.weights.items()})


# On a CPU: the double's arrays in the model, NumPy's in its attention


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """CuPy's double, in CuPy's place."""
    cupy = strict_cupy.Module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    known = operations._named
    monkeypatch.setattr(operations, "_named", lambda name: strict_cupy.Rows if name == "cupy" else known(name))
    monkeypatch.setattr(training, "carrying", lambda comm, *_: comm)
    return cupy


class OnHost:
    """An attention that computes in NumPy."""

    def __init__(self, attention: Any, cupy: Any) -> None:
        self.attention, self.cupy = attention, cupy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def forward(self, *arrays: Any, **given: Any) -> tuple[Any, Any]:
        out, saved = self.attention.forward(*(array.get() for array in arrays), **given)
        return self.cupy.asarray(out), saved

    def again(self, *arrays: Any) -> Any:
        return self.cupy.asarray(self.attention.again(*(array.get() for array in arrays)))

    def backward(self, d_out: Any, saved: Any) -> Any:
        return tuple(map(self.cupy.asarray, self.attention.backward(d_out.get(), saved)))


def test_the_double_does_not_mix(double: Any) -> None:
    array = double.asarray(np.ones(3, np.float32))
    for mixed in (lambda: array + np.ones(3), lambda: np.ones(3) + array, lambda: double.add(array, np.ones(3)),
                  lambda: np.asarray(array)):  # fmt: skip
        with pytest.raises(TypeError):
            mixed()
    assert type(double.exp(array) * 2) is type(array) and float((array + array).sum()) == 6


@pytest.mark.mpi(sizes=[1])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_training_in_the_double(comm: Any, double: Any, dtype: str, tmp_path: Path) -> None:
    """To the bit as in NumPy, through a checkpoint as well."""
    right, trainer, resumed = (Trainer(comm, plan(dtype=dtype), TEXT, "ring", xp=xp) for xp in (np, double, double))
    for each in (trainer, resumed):
        each.attention = OnHost(each.attention, double)  # type: ignore[assignment]
    for _ in range(2):
        assert trainer.train() == right.train()
    checkpoint.resume(checkpoint.save(tmp_path, trainer, {}), resumed)
    assert resumed.train() == trainer.train() == right.train()
    assert resumed.validate(1) == right.validate(1)


@pytest.mark.mpi(sizes=[1])
def test_generation_in_the_double(comm: Any, double: Any) -> None:
    found, prompt = [], tokens(13)[0].tolist()
    for xp in (np, double):
        with RingAttention(comm, mask=Causal()) as attention:
            generator = Generator(in_cupy(llama(), xp), attention)
            if xp is double:
                generator.attention, generator.several, generator.single = (  # type: ignore[assignment]
                    OnHost(each, double) for each in (attention, generator.several, generator.single)
                )
            found.append(list(generator.generate(prompt, 9)))
    assert found[0] == found[1]


@pytest.mark.mpi(sizes=[1])
def test_a_layer_in_the_double(comm: Any, double: Any) -> None:
    x, d_out = np.random.default_rng(0).standard_normal((2, 1, 9, 8))
    found = []
    for xp in (np, double):
        with AttentionLayer(8, 2, comm=comm, algorithm="ring", dtype=np.float64) as layer:
            if xp is double:
                layer.weights = {name: double.asarray(weight) for name, weight in layer.weights.items()}
                layer.attention = OnHost(layer.attention, double)
            out, saved = layer.forward(xp.asarray(x))
            d_x, gradients = layer.backward(xp.asarray(d_out), saved)
            found.append([on_host(array) for array in (out, d_x, *gradients.values())])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


# On GPUs


@pytest.mark.gpu
@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", [name for name in SHARE_TOKENS if name != "shared_ring"])
def test_logits_and_tokens(comm: Any, xp: Any, name: str) -> None:
    """Of float64, within rounding those of NumPy; the same greedy tokens."""
    given, found = tokens(23), []
    for each in (np, xp):
        model = in_cupy(llama(), each)
        with ALGORITHMS[name](comm, mask=Causal()) as attention:
            mine = attention.positions(23)

            def attend(_: int, q: Array, k: Array, v: Array, attention: Any = attention) -> tuple[Array, Any]:
                return attention.forward(q, k, v)  # type: ignore[no-any-return]

            logits = on_host(model.logits(model.forward(each.asarray(given[:, mine]), mine, attend)))
            generator = Generator(model, attention)
            found.append((logits, list(generator.generate(given[0].tolist(), 9))))
            generator.free()
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-10)
    assert found[0][1] == found[1][1]


@pytest.mark.gpu
@pytest.mark.mpi(sizes=[1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 1e-4), ("bfloat16", 5e-3)])
def test_losses(comm: Any, xp: Any, dtype: str, tolerance: float) -> None:
    """Steps on GPUs, with messages of device memory and through the host, on grids of both kinds."""
    wide = "float64" if dtype == "float64" else "float32"
    alone = Trainer(comm, plan(dtype=wide), TEXT)
    right = [alone.train() for _ in range(4)] + [alone.validate(2)]
    alone.free()
    for data in {1, comm.Get_size()}:
        for messages in ("auto", "host"):
            trainer = Trainer(
                comm, plan(dtype=dtype, recompute=data > 1), TEXT, data=data, xp=xp, gpu_messages=messages
            )
            found = [trainer.train() for _ in range(4)] + [trainer.validate(2)]
            trainer.free()
            assert found == pytest.approx(right, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.mpi(max_size=4)
def test_a_layer(comm: Any, xp: Any) -> None:
    x, d_out = np.random.default_rng(0).standard_normal((2, 1, 9, 8))
    found = []
    for each in (np, xp):
        with AttentionLayer(8, 2, comm=comm, algorithm="ring", dtype=np.float64) as layer:
            layer.weights = {name: each.asarray(weight) for name, weight in layer.weights.items()}
            mine = layer.attention.positions(9)
            out, saved = layer.forward(each.asarray(x[:, mine]))
            d_x, gradients = layer.backward(each.asarray(d_out[:, mine]), saved)
            found.append([on_host(array) for array in (out, d_x, *gradients.values())])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
