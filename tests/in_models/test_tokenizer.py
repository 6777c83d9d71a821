"""Folders with a tokenizer: chat templates, and tokenizers of other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from small_llama import CONFIG, llama

from mpiattn.errors import InputError
from mpiattn.models.model import Model
from mpiattn.models.tokenizer import from_folder

WORDS = {"<s>": 0, "</s>": 1, "user": 2, ":": 3, "hi": 4, "bot": 5, "?": 6}


def write(path: Path, words: dict[str, int] = WORDS, **more: Any) -> Path:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **more}))
    (path / "config.json").write_text(json.dumps({**CONFIG.to_json(), "bos_token_id": 0}))
    save_file(dict(llama(dtype=np.float32).weights), path / "model.safetensors")
    return path


def test_chat(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %} bot:"
    tokenizer = from_folder(write(tmp_path, chat_template=template))
    assert tokenizer.chat("hi hi") == [0, 2, 3, 4, 4, 5, 3]
    assert from_folder(write(tmp_path)).chat("hi hi") == [4, 4]
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    with pytest.raises(InputError, match="no users"):
        from_folder(tmp_path).chat("hi")
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")  # templates run in a sandbox
    with pytest.raises(InputError, match="does not work"):
        from_folder(tmp_path).chat("hi")


@pytest.mark.mpi(max_size=3)
def test_tokenizers_of_other_models(comm: Any, mpi_tmp_path: Path) -> None:
    def refused(message: str, **given: Any) -> None:
        if comm.Get_rank() == 0:
            write(mpi_tmp_path, **given)
        comm.Barrier()
        with pytest.raises(InputError, match=message):
            Model(comm, mpi_tmp_path)

    refused("has 70 tokens, the model 61", words={**WORDS, **{f"w{number}": number for number in range(7, 70)}})
    refused("first token '</s>' is 1, the model's is 0", bos_token="</s>")
    if comm.Get_rank() == 0:
        write(mpi_tmp_path)
        (mpi_tmp_path / "tokenizer.json").write_text("{}")
    comm.Barrier()
    with pytest.raises(InputError, match=r"tokenizer.json is damaged"):
        Model(comm, mpi_tmp_path)
    if comm.Get_rank() == 0:
        (mpi_tmp_path / "tokenizer.json").unlink()
    comm.Barrier()
    with pytest.raises(InputError, match=r"tokenizer.json: no such file"):
        Model(comm, mpi_tmp_path)
