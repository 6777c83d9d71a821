"""Llama on spread tokens: the same logits and gradients as on one rank; generation; files; what is refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_llama import CONFIG, llama, tokens

import mpiattn
from mpiattn import ALGORITHMS, Causal, InputError
from mpiattn.algorithms.sharing import SHARE_TOKENS
from mpiattn.arrays import Array
from mpiattn.commands.generate import command
from mpiattn.conformance import oracle
from mpiattn.models.attention_layer import AttentionLayer, SequenceParallel
from mpiattn.models.cache import Cache
from mpiattn.models.config import Config
from mpiattn.models.folder import Folder, alike
from mpiattn.models.generation import Generator, Nucleus
from mpiattn.models.layers import cross_entropy, cross_entropy_backward, linear_backward
from mpiattn.models.llama import Llama, add, full
from mpiattn.problems.layout import EVERYWHERE


def on_one_rank(model: Llama, given: Array) -> Array:
    """Return the logits by textbook attention."""

    def attend(_: int, q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return oracle.attention(q, k, v, Causal())[0], None

    return model.logits(model.forward(given, np.arange(given.shape[1]), attend))


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", SHARE_TOKENS)
def test_logits(comm: Any, name: str) -> None:
    """The same logits as by textbook attention on one rank, with every algorithm."""
    model = llama()
    for count in (23, 2):  # 2: fewer than ranks
        given = tokens(count, batch=2)
        right = on_one_rank(model, given)
        with ALGORITHMS[name](comm, mask=Causal()) as attention:
            mine = attention.positions(count)
            hidden = model.forward(given[:, mine], mine, lambda _, q, k, v: attention.forward(q, k, v))
        assert np.allclose(model.logits(hidden), right[:, mine], rtol=0, atol=1e-11)


@pytest.mark.mpi(sizes=[1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients(comm: Any, tied: bool) -> None:
    """The gradient of the loss along a random direction of all weights is its finite difference."""
    sizes = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    model = llama(Config(**{**sizes, "tie_word_embeddings": tied}))
    given = tokens(19)
    targets = np.append(given[:, 1:], [[-1]], axis=1)
    gradients: dict[str, Array] = {}
    with mpiattn.MeshAttention(comm, mask=Causal()) as attention:
        mine = attention.positions(19)
        tape: list[Any] = []
        hidden = model.forward(given[:, mine], mine, lambda _, q, k, v: attention.forward(q, k, v), tape)
        d_logits = cross_entropy_backward(1.0, model.logits(hidden), targets[:, mine])
        d_hidden, d_head, _ = linear_backward(d_logits, hidden, model.head)
        add(gradients, "model.embed_tokens.weight" if tied else "lm_head.weight", d_head)
        model.backward(d_hidden, tape, attention.backward, gradients)
    assert not tape and set(gradients) == set(model.weights)
    rng = np.random.default_rng(3)
    way = {name: rng.standard_normal(weight.shape) for name, weight in model.weights.items()}
    along = comm.allreduce(sum(float((gradients[name] * way[name]).sum()) for name in way))
    ends = []
    for step in (1e-6, -1e-6):
        moved = Llama(model.config, {name: weight + step * way[name] for name, weight in model.weights.items()})
        ends.append(float(cross_entropy(on_one_rank(moved, given), targets).sum()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(along, rel=1e-6)


# The layer of the article


@pytest.mark.mpi(sizes=[1, 2, 4])
@pytest.mark.parametrize("name", ["mesh", "ulysses"])
def test_sequence_parallel(comm: Any, name: str) -> None:
    """The whole sequence in and out on rank 0, and gradients that are finite differences."""
    rank, x, d_out = comm.Get_rank(), *np.random.default_rng(1).standard_normal((2, 1, 11, 8))
    shape = {4: (2, 2), 2: (1, 2), 1: (1, 1)}[comm.Get_size()] if name == "mesh" else None
    with SequenceParallel(8, 2, shape, comm=comm, algorithm=name, dtype=np.float64, mask=Causal()) as layer:

        def loss(x: Array) -> float:
            out, _ = layer.forward(x if rank == 0 else None)
            return float(comm.bcast(None if out is None else float((out * d_out).sum())))

        out, saved = layer.forward(x if rank == 0 else None)
        assert (out is None) == (rank > 0)
        if out is not None:
            q, k, v = (layer.project(x, n).reshape(1, 11, 2, 4).swapaxes(1, 2) for n in "qkv")
            right = oracle.attention(q, k, v, Causal())[0].swapaxes(1, 2).reshape(1, 11, 8)
            assert np.allclose(out, layer.project(right, "o"))
        d_x, gradients = layer.backward(d_out if rank == 0 else None, saved)
        way = np.random.default_rng(2).standard_normal(x.shape)
        along = comm.bcast(None if d_x is None else float((d_x * way).sum()))
        assert (loss(x + 1e-6 * way) - loss(x - 1e-6 * way)) / 2e-6 == pytest.approx(along, rel=1e-6)
        for key, gradient in gradients.items():
            if key == "b_k":
                assert np.abs(gradient).max() < 1e-12  # the same number added to all scores of a query changes nothing
                continue
            weight, way = layer.weights[key], np.random.default_rng(2).standard_normal(gradient.shape)
            ends = []
            for step in (1e-6, -1e-6):
                layer.weights[key] = weight + step * way
                ends.append(loss(x))
            layer.weights[key] = weight
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((gradient * way).sum()), rel=1e-6)


@pytest.mark.mpi(max_size=3)
def test_attention_layer_drops_with_a_seed(comm: Any) -> None:
    with AttentionLayer(8, 2, dropout=0.5, comm=comm, algorithm="ring") as layer:
        x = np.ones((1, len(layer.attention.positions(9)), 8), np.float32)
        still, _ = layer.forward(x)
        once, _ = layer.forward(x, seed=1)
        again, _ = layer.forward(x, seed=1)
        other, _ = layer.forward(x, seed=2)
    assert np.array_equal(once, again) and not np.array_equal(once, other) and not np.array_equal(once, still)


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "divisor of d_model 8"),
        ({"algorithm": "tensor_parallel"}, "does not share out tokens"),
        ({"algorithm": "rings"}, "unknown algorithm 'rings': choose from .*, hybrid$"),
        ({"algorithm": "ring", "grid_shape": (1, 1)}, "has no grid"),
        ({"grid_shape": (3, 5)}, "grid of 3x5"),
        ({"dropout": 1.5}, "rate"),
        ({"d_model": 8.0}, "d_model is a whole number, 1 or more, got 8.0"),
        ({"num_heads": None}, "num_heads is a whole number, 1 or more, got None"),
        ({"grid_shape": 5}, "whole numbers, 1 or more"),
        ({"seed": -1}, "seed is a whole number, 0 or more, got -1"),
        ({"dtype": np.int32}, "dtype is one of float64, float32, float16, bfloat16, got .*int32"),
        ({"dtype": "flaot32"}, "dtype is one of float64, float32, float16, bfloat16, got 'flaot32'"),
        ({"algorithm": "ring", "rows": 1}, "RingAttention has no option 'rows': choose from layout, mask, "),
        ({"mesk": None}, "MeshAttention has no option 'mesk': did you mean mask"),
    ],
)
@pytest.mark.parametrize("everywhere", [True, False])
def test_attention_layer_refuses(comm: Any, arguments: dict[str, Any], message: str, everywhere: bool) -> None:
    """On every rank, also where one is wrong."""
    arguments = arguments if everywhere or comm.rank == comm.size - 1 else {}
    with pytest.raises(ValueError, match=f"{message}|is .* on rank . and .* on rank 0: it must be the same"):
        AttentionLayer(**{"d_model": 8, "num_heads": 2, "comm": comm, **arguments})


@pytest.mark.mpi(min_size=2, max_size=3)
def test_attention_layers_are_the_same_on_all_ranks(comm: Any) -> None:
    with pytest.raises(InputError, match="seed is 1 on rank 1 and 0 on rank 0"):
        AttentionLayer(8, 2, comm=comm, seed=comm.rank)
    with pytest.raises(InputError, match="dtype is 'float32' on rank 1 and 'float64' on rank 0"):
        AttentionLayer(8, 2, comm=comm, dtype="float32" if comm.rank else "float64")
    x = np.zeros((1, 4, 8), np.float32)
    with AttentionLayer(8, 2, comm=comm, algorithm="ring") as layer:
        for wrong in (x[0], x[:, :, :7], None, x.tolist()):
            with pytest.raises(InputError, match=r"x is .*; it must be an array \(batch, tokens, 8\)"):
                layer.forward(wrong if comm.rank == comm.size - 1 else x)
        with pytest.raises(InputError, match="x is an array of int64; it must be one of float64, float32, float16, bf"):
            layer.forward(x.astype(int) if comm.rank == comm.size - 1 else x)
        out, saved = layer.forward(x)
        last: Any = comm.rank == comm.size - 1
        for gradient, what, message in (
            (out[:, :1], saved, "d_out is .* it must be an array .1, 4, 8."),
            (None, saved, "d_out is NoneType"),
            (out.astype(int), saved, "d_out is an array of int64"),
            (out, None, "saved is not what a layer's forward returns"),
        ):
            with pytest.raises(InputError, match=message):
                layer.backward(*((gradient, what) if last else (out, saved)))
        layer.backward(out, saved)
        x += last
        with pytest.raises(InputError, match="x was changed between forward and backward"):
            layer.backward(out, saved)


# Generation


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", SHARE_TOKENS)
def test_greedy_tokens(comm: Any, name: str) -> None:
    """The tokens are the most probable ones by textbook attention to all that came before."""
    model, prompt = llama(), tokens(13)[0].tolist()
    right = [*prompt]
    for _ in range(9):
        right.append(int(on_one_rank(model, np.array([right]))[0, -1].argmax()))
    assert len(set(right[13:])) > 3
    with ALGORITHMS[name](comm, mask=Causal()) as attention:
        generator = Generator(model, attention, "tree" if name == "ring" else "allreduce")
        cache = generator.cache()
        new = list(generator.generate(prompt, 5, cache=cache))
        new += generator.generate([new[-1]], 4, cache=cache)  # goes on from the cache
        generator.free()
    assert new == right[13:]
    assert abs(len(cache.positions) - 21 / comm.Get_size()) <= 2
    assert cache.nbytes == len(cache.positions) * 2 * 2 * 3 * 4 * 8


@pytest.mark.mpi(max_size=3)
def test_auto_attends_to_the_prompt(comm: Any) -> None:
    """As `mpiattn generate --algorithm auto` has it: what is chosen can take a prompt."""
    model, prompt = llama(), tokens(13)[0].tolist()
    args = generate_arguments("--algorithm", "auto", "--dtype", "float64")
    with command.attention(args, args.algorithm, comm, CONFIG, len(prompt)) as attention:
        generator = Generator(model, attention)
        [new] = generator.generate(prompt, 1)
        generator.free()
    assert new == on_one_rank(model, np.array([prompt]))[0, -1].argmax()


def generate_arguments(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--prompt", "", *more])


@pytest.mark.parametrize("name", ["decode", "tensor_parallel", "messh"])
def test_algorithms_that_are_offered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate_arguments("--algorithm", name)
    offered = capsys.readouterr().err.partition("choose from ")[2].strip().split(", ")
    assert offered == [*SHARE_TOKENS, "auto"]


@pytest.mark.mpi(max_size=2)
def test_algorithms_that_share_out_tokens(comm: Any) -> None:
    """Those that are said to are those whose attention a prompt is given to."""
    for name, algorithm in ALGORITHMS.items():
        with algorithm(comm) as attention:
            assert (attention.layout == EVERYWHERE or bool(attention.copied)) == (name not in SHARE_TOKENS)


def test_seeds_of_what_is_drawn() -> None:
    with pytest.raises(InputError, match="--seed is 0 or more, got -1"):
        command.sampler(generate_arguments("--temperature", "1", "--seed", "-1"))
    for seed in (-1, 0.5):
        with pytest.raises(InputError, match=f"seed is a whole number, 0 or more, got {seed}"):
            Nucleus(1.0, seed=seed)  # type: ignore[arg-type]


@pytest.mark.mpi(max_size=3)
def test_end_and_context(comm: Any) -> None:
    """Generation ends with the model's last token, or where its context is full."""
    model, prompt = llama(), tokens(13)[0].tolist()
    with mpiattn.RingAttention(comm, mask=Causal()) as attention:
        generator = Generator(model, attention)
        new = list(generator.generate(prompt, 1000))
        assert len(prompt) + len(new) == CONFIG.max_position_embeddings + 1
        sizes = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
        ending = Generator(Llama(Config(**{**sizes, "eos_token_id": (new[4],)}), model.weights), attention)
        assert list(ending.generate(prompt, 1000)) == new[: new.index(new[4]) + 1]
        assert list(generator.generate(prompt, 0)) == []


@pytest.mark.mpi(max_size=3)
def test_sampling(comm: Any) -> None:
    """Draws depend on the seed alone; all ranks get those of rank 0."""
    model, prompt = llama(), tokens(13)[0].tolist()
    with mpiattn.RingAttention(comm, mask=Causal()) as attention:
        generator = Generator(model, attention)
        rank = comm.Get_rank()
        drawn = [list(generator.generate(prompt, 9, Nucleus(2.0, seed=seed + 7 * rank))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert comm.bcast(drawn) == drawn


def test_nucleus() -> None:
    """Only the most probable tokens that together have top_p are drawn, as often as they are probable."""
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    draw = Nucleus(1.0, 0.69, seed=0)
    counts = np.bincount([draw(logits) for _ in range(4000)], minlength=4) / 4000
    assert counts == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    hot = Nucleus(0.5, 1.0, seed=0)
    counts = np.bincount([hot(logits) for _ in range(4000)], minlength=4) / 4000
    assert counts == pytest.approx(np.array([1, 16, 4, 9]) / 30, abs=0.03)
    for wrong in ({"temperature": 0}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}):
        with pytest.raises(InputError, match="above 0"):
            Nucleus(**{"temperature": 1.0, **wrong})  # type: ignore[arg-type]


@pytest.mark.mpi(max_size=3)
def test_generation_refuses(comm: Any) -> None:
    model, last = llama(), comm.Get_rank() == comm.Get_size() - 1
    with mpiattn.RingAttention(comm, mask=Causal()) as attention:
        generator: Any = Generator(model, attention)
        for prompt, count, message in [
            ([], 1, "prompt is empty"),
            ([1, 61], 1, "token 61; the model knows 0 to 60"),
            ([1] * 65, 1, "65 tokens; the model's context is 64"),
            ([1], -1, "at least 0"),
            ([1, 2] if last else [1], 1, "another prompt" if comm.Get_size() > 1 else ""),
            (None if last else [1], 1, "a prompt is a sequence of tokens, got NoneType"),
            ([1, 2.5] if last else [1, 2], 1, "a token is a whole number, got 2.5"),
            ("text", 1, "a token is a whole number, got 't'"),
            ([1], "5" if last else 5, "max_new_tokens is at least 0, got '5'"),
        ]:
            if message:
                with pytest.raises(InputError, match=message):
                    list(generator.generate(prompt, count))
        for sampler, message in (
            (lambda logits: logits[61], "the sampler raised IndexError"),
            (lambda logits: 61, "the sampler returned 61; the model knows 0 to 60"),
            (lambda logits: None, "the sampler returned None"),
        ):
            with pytest.raises(InputError, match=message):
                list(generator.generate([1], 1, sampler))
        whole = list(generator.generate(np.array([1, 2, 3]), np.int64(2)))
        assert whole == list(generator.generate(iter([1, 2, 3]), 2))
        cache = generator.cache()
        list(generator.generate([1] * 60, 1, cache=cache))
        with pytest.raises(InputError, match=r"5 tokens, after 60 in the cache; .* 64"):
            list(generator.generate([1] * 5, 1, cache=cache))
    with (
        mpiattn.TensorParallelAttention(comm, mask=Causal()) as attention,
        pytest.raises(InputError, match="shared out"),
    ):
        Generator(model, attention)


@pytest.mark.mpi(sizes=[3])
def test_a_cache_of_another_sharding(comm: Any) -> None:
    from mpi4py import MPI

    model = llama()
    caches = []
    for layout in ("zigzag", "contiguous"):
        with mpiattn.RingAttention(comm, mask=Causal(), layout=layout) as attention:
            generator = Generator(model, attention)
            caches.append(generator.cache())
            list(generator.generate([1] * 12, 1, cache=caches[-1]))
    with mpiattn.RingAttention(MPI.COMM_SELF, mask=Causal()) as attention:
        alone = Generator(model, attention)
        with pytest.raises(InputError, match=r"is that of rank . of 3"):
            list(alone.generate([1], 1, cache=caches[0]))
    with mpiattn.RingAttention(comm, mask=Causal()) as attention:
        generator = Generator(model, attention)
        mixed = caches[comm.Get_rank() == 0]
        with pytest.raises(InputError, match="different prompts or layouts"):
            list(generator.generate([1], 1, cache=mixed))
        sizes = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
        other = Generator(llama(Config(**{**sizes, "num_hidden_layers": 1})), attention)
        with pytest.raises(InputError, match="another model"):
            list(other.generate([1], 1, cache=caches[0]))


@pytest.mark.mpi(max_size=2)
def test_cache_grows(comm: Any) -> None:
    cache = Cache(comm, CONFIG, np.empty(0, np.float32), np)
    for length in (200, 500, 1000):
        mine = cache.owned(length)
        cache.extend(mine, length)
        k = np.broadcast_to(mine[:, None].astype(np.float32), (1, 3, len(mine), 4))
        cache.put(1, k, -k)
    k, v = cache.of(1)
    assert np.array_equal(k[0, 0, :, 0], cache.positions) and np.array_equal(v, -k)
    assert comm.allreduce(cache.nbytes) == 1000 * 2 * 2 * 3 * 4 * 4


# Files


def write(path: Path, weights: Mapping[str, Array], **changed: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG.to_json(), **changed}))
    save_file(dict(weights), path / "model.safetensors")
    return path


def test_folder(tmp_path: Path) -> None:
    weights = llama(dtype=np.float32).weights
    folder = Folder(write(tmp_path, weights))
    assert folder.config == CONFIG
    alike(folder.config, folder.shapes(), tmp_path)
    assert all(np.array_equal(folder.read(name), weight) for name, weight in weights.items())


def test_folder_of_several_files(tmp_path: Path) -> None:
    weights = llama(dtype=np.float32).weights
    write(tmp_path, weights)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, tmp_path / f"part{number}.safetensors")
    table = {name: f"part{place % 2}.safetensors" for place, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    folder = Folder(tmp_path)
    alike(folder.config, folder.shapes(), tmp_path)
    assert all(np.array_equal(folder.read(name), weight) for name, weight in weights.items())
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(InputError, match=r"part1.safetensors: no such file"):
        Folder(tmp_path)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_bad_folders(tmp_path: Path) -> None:
    weights = llama(dtype=np.float32).weights
    name, file = full(1, "mlp.up_proj"), tmp_path / "model.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            folder = Folder(tmp_path)
            alike(folder.config, folder.shapes(), tmp_path)

    with pytest.raises(InputError, match=r"config.json: no such file"):
        Folder(tmp_path / "nowhere")
    write(tmp_path, {key: weight for key, weight in weights.items() if key != name})
    refused(f"no weight {name}")
    write(tmp_path, {**weights, name: weights[name].T.copy()})
    refused(r"\(24, 40\); by its config it must be \(40, 24\)")
    write(tmp_path, {**weights, name: weights[name].astype(np.int32)})
    refused("I32; a weight is")
    write(tmp_path, {**weights, full(2, "mlp.up_proj"): weights[name]})
    refused("config does not know")
    write(tmp_path, weights)
    whole = file.read_bytes()
    for cut in (whole[:-100], whole[:500], whole[:4], b"", (10**15).to_bytes(8, "little") + whole[8:]):
        file.write_bytes(cut)
        refused("cut, damaged or no .safetensors")
    file.unlink()
    refused("no such file")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 4}, "multiple of"),
        ({"hidden_size": "24"}, "hidden_size is an integer"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"head_dim": 3}, "must be even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is a number above 0"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "only default, linear and llama3"),
        ({"rope_scaling": "linear"}, "rope_scaling and rope_parameters are tables"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of rope_scaling is a number above 0, got None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor of rope_scaling is a number above 0, got 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor of rope_scaling is a number above 0"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor of rope_scaling is a number"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor of rope_scaling must be less"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5: only 1.0 is known"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is at most 10000"),
        ({"eos_token_id": "</s>"}, "eos_token_id is the number of a token, got '</s>'"),
        ({"bos_token_id": [1]}, "bos_token_id is the number of a token"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is true or false, got 'no'"),
    ]
    for changed, message in wrong:
        write(tmp_path, weights, **changed)
        refused(message)
    for text in ('{"model_type": ', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        refused("config.json is damaged")
    write(tmp_path, weights)
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused("has no weight_map")


def test_frequencies() -> None:
    """Of Llama 3.1: those that turn seldom within the first context are divided, those that turn often kept."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    sizes = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    plain = Config(**{**sizes, "head_dim": 16}).frequencies
    scaled = Config(**{**sizes, "head_dim": 16, "rope_scaling": scaling}).frequencies
    turns = 64 * plain / (2 * np.pi)
    assert np.array_equal(scaled[turns > 4], plain[turns > 4]) and (turns > 4).any()
    assert np.allclose(scaled[turns < 1], plain[turns < 1] / 8) and (turns < 1).any()
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((plain[between] / 8 < scaled[between]) & (scaled[between] < plain[between])).all()
    assert np.allclose(
        Config(**{**sizes, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}).frequencies, CONFIG.frequencies / 2
    )
