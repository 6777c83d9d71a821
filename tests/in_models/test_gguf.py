"""GGUF files: small ones, written by the library, read back; and every kind of damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from small_llama import CONFIG, llama

from mpiattn.arrays import Array
from mpiattn.errors import InputError
from mpiattn.models.folder import alike
from mpiattn.models.gguf import CONFIG as KEYS
from mpiattn.models.gguf import GGUF, NAMES
from mpiattn.models.model import Model

KINDS = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Sizes whose rows are whole blocks of 32, as quantised ones must be."""


def sizes(**changed: Any) -> Any:
    return type(CONFIG)(**{**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}, **WIDE, **changed})


def write(path: Path, kind: str = "F32", architecture: str = "llama", **more: Any) -> dict[str, Array]:
    """Write a model as llama.cpp's converter does, its tokens single bytes; return the weights."""
    config = sizes(vocab_size=259)
    weights = dict(llama(config, np.float32).weights)
    short = {long: name for name, long in NAMES.items()}
    writer = gguf.GGUFWriter(path, architecture)
    for name, key in KEYS.items():
        value = getattr(config, name)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    alphabet = sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*alphabet, "<s>", "</s>", "he"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    for name, weight in weights.items():
        *block, long = name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)
        where = f"blk.{block[0]}." if name.startswith("model.layers.") else ""
        gone = short[long] if where else short[name.removesuffix(".weight")]
        if gone in ("attn_q", "attn_k"):  # heads of pairs beside each other, as llama.cpp turns them
            weight = weight.reshape(-1, 2, 16, 64).swapaxes(1, 2).reshape(weight.shape)
        if kind == "F32" or weight.ndim == 1:
            writer.add_tensor(f"{where}{gone}.weight", weight)
        else:
            code = gguf.GGMLQuantizationType(KINDS[kind])
            rows = gguf.quantize(weight, code)
            writer.add_tensor(f"{where}{gone}.weight", rows, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    weights = write(path, kind)
    file = GGUF(path)
    assert file.config == sizes(
        vocab_size=259, rms_norm_eps=file.config.rms_norm_eps, bos_token_id=256, eos_token_id=(257,)
    )
    assert file.config.rms_norm_eps == pytest.approx(1e-6)
    alike(file.config, file.shapes(), path)
    bound = {"F32": 0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2}[kind]
    for name, weight in weights.items():
        assert np.abs(file.read(name) - weight).max() <= bound * np.abs(weight).max()


def test_cut_anywhere(tmp_path: Path) -> None:
    """A file that ends early is refused, wherever it ends."""
    path = tmp_path / "model.gguf"
    write(path)
    whole = path.read_bytes()
    header = GGUF(path).at
    for end in [*range(0, header, 97), header, header + 1000, len(whole) - 100]:
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cut|no GGUF"):
            GGUF(path)


@pytest.mark.timeout(60)
def test_lengths_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """Each length of the header in turn says 2^60: no memory is taken, no loop is entered that long."""
    path = tmp_path / "model.gguf"
    write(path)
    whole = path.read_bytes()
    huge = struct.pack("<Q", 2**60)
    header, refused = GGUF(path).at, 0
    for at in [*range(8, 1600, 4), *range(header - 1600, header - 8, 4)]:
        path.write_bytes(whole[:at] + huge + whole[at + 8 :])
        try:
            file = GGUF(path)
            alike(file.config, file.shapes(), path)
        except InputError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type"),
    ],
)
def test_other_models(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "model.gguf", **change)
    with pytest.raises(InputError, match=message):
        GGUF(tmp_path / "model.gguf")


@pytest.mark.mpi(max_size=3)
def test_model(comm: Any, mpi_tmp_path: Path) -> None:
    """The weights are in memory once a host, the same on all ranks; the tokenizer goes there and back."""
    path = mpi_tmp_path / "model.gguf"
    weights = write(path) if comm.Get_rank() == 0 else None
    weights = comm.bcast(weights)
    with Model(comm, path) as model:
        assert all(np.array_equal(model.llama.weights[name], weight) for name, weight in weights.items())
        text = "hehe  Grüße 123 🙂\n"
        numbers = model.tokenizer.encode(text)
        assert numbers[:2] == [258, 258] and model.tokenizer.decode(numbers) == text
        assert model.tokenizer.chat(text) == numbers  # there is no template
        assert model.tokenizer.decode([256, *numbers, 257]) == text
        del model.llama
    missing = mpi_tmp_path / "none.gguf"
    with pytest.raises(InputError, match=r"none.gguf: no such file"):
        Model(comm, missing)


@pytest.mark.mpi(max_size=3)
def test_numbers_that_are_none(comm: Any, mpi_tmp_path: Path) -> None:
    """A weight of NaN is an error on all ranks, also on those that read nothing."""
    path = mpi_tmp_path / "model.gguf"
    if comm.Get_rank() == 0:
        write(path)
        place = GGUF(path).tensors["model.norm.weight"].begin
        data = bytearray(path.read_bytes())
        data[place : place + 4] = struct.pack("<f", float("nan"))
        path.write_bytes(data)
    comm.Barrier()
    with pytest.raises(InputError, match=r"model.norm.weight has numbers that are not finite"):
        Model(comm, path)
