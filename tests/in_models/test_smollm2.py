"""The real model beside transformers: logits and greedy tokens, on every number of ranks and by every algorithm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from launch import mpiexec
from safetensors.numpy import save_file

from mpiattn import ALGORITHMS, Causal
from mpiattn.algorithms.sharing import SHARE_TOKENS
from mpiattn.commands.root import patiently
from mpiattn.machines.writing import write_json
from mpiattn.models.folder import SINGLE
from mpiattn.models.generation import Generator
from mpiattn.models.model import Model, found

QUESTION = "Why is the sky blue? Answer in one sentence."
TEXT = "Numbers: 1 2 3, 12345. " + " ".join(f"The {word} is under the tree." for word in ("cat", "dog", "naïve 🙂")) * 6
NEW = 16

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    from mpi4py import MPI

    model = Model(MPI.COMM_WORLD, "smollm2")
    yield model
    del model.llama
    model.free()


@pytest.fixture(scope="module")
def reference(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Logits and greedy tokens by transformers, on rank 0, of a folder with the same weights; the same on all ranks."""
    from mpi4py import MPI

    def work() -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("folder")
        write_json(folder / "config.json", model.config.to_json())
        save_file({name: np.ascontiguousarray(w) for name, w in model.llama.weights.items()}, folder / SINGLE)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        text, prompt = model.tokenizer.encode(TEXT), model.tokenizer.chat(QUESTION)
        with torch.no_grad():
            logits = other(torch.tensor([text])).logits.numpy()
            greedy = other.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :]
        return {"text": text, "prompt": prompt, "logits": logits, "greedy": greedy.tolist()}

    return MPI.COMM_WORLD.bcast(patiently(MPI.COMM_WORLD, work))


def test_transformers_reads_the_same() -> None:
    """The file's weights and tokens are those that transformers gets from it, to the bit."""
    import torch
    from mpi4py import MPI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("accelerate")  # transformers reads no GGUF file without it
    path = found("smollm2")
    given = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    other, tokenizer = (
        AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32),
        AutoTokenizer.from_pretrained(**given),
    )
    weights = {name: weight.numpy() for name, weight in other.state_dict().items() if name != "lm_head.weight"}
    messages = [{"role": "user", "content": QUESTION}]
    with Model(MPI.COMM_SELF, "smollm2") as model:
        assert weights.keys() == model.llama.weights.keys()
        assert all(np.array_equal(weight, weights[name]) for name, weight in model.llama.weights.items())
        numbers = model.tokenizer.encode(TEXT)
        assert numbers == tokenizer(TEXT).input_ids and model.tokenizer.decode(numbers) == TEXT
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert model.tokenizer.chat(QUESTION) == chat
        del model.llama


@pytest.mark.mpi
@pytest.mark.parametrize("name", SHARE_TOKENS)
def test_logits(comm: Any, model: Model, reference: Any, name: str) -> None:
    given = np.array([reference["text"]])
    with ALGORITHMS[name](comm, mask=Causal()) as attention:
        mine = attention.positions(given.shape[1])
        hidden = model.llama.forward(given[:, mine], mine, lambda _, q, k, v: attention.forward(q, k, v))
    right = reference["logits"]
    assert np.abs(model.llama.logits(hidden) - right[:, mine]).max() < 1e-5 * np.abs(right).max()


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["mesh", "ulysses"])
def test_greedy_tokens(comm: Any, model: Model, reference: Any, name: str) -> None:
    with ALGORITHMS[name](comm, mask=Causal()) as attention:
        generator = Generator(model.llama, attention)
        assert list(generator.generate(reference["prompt"], NEW)) == reference["greedy"]
        generator.free()


def mpiattn(n: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return mpiexec(n, sys.executable, "-m", "mpiattn", "generate", *arguments, timeout=240)


def test_command(tmp_path: Any) -> None:
    """The same text on one rank and on four; the cache in quarters; errors once."""
    sizes = ("--max-new-tokens", "8")
    alone = mpiattn(1, "--prompt", QUESTION, *sizes)
    assert alone.returncode == 0 and alone.stdout.startswith("The sky is blue because")
    drawn = ("--plot", str(tmp_path / "cache.png"), "--algorithm", "ring", "--combine", "tree")
    four = mpiattn(4, "--prompt", QUESTION, *sizes, *drawn)
    assert four.returncode == 0 and four.stdout == alone.stdout
    assert (tmp_path / "cache.png").read_bytes()[1:4] == b"PNG"
    parts = [float(part) for part in four.stderr.split("cache: ")[1].split(" MB")[0].split(", ")]
    assert len(parts) == 4 and max(parts) < 1.1 * min(parts)
    (tmp_path / "long.txt").write_text("word " * 9000)
    for arguments, message in [
        (("--prompt-file", str(tmp_path / "long.txt")), "tokens; the model's context is 8192"),
        (("--prompt-file", str(tmp_path / "none.txt")), "none.txt"),
        (("--prompt", "x", "--model", str(tmp_path / "none")), "no such file or folder"),
        (("--prompt", "x", "--top-p", "0.5"), "--top-p and --seed go with --temperature"),
    ]:
        done = mpiattn(2, *arguments)
        assert done.returncode == 2 and done.stderr.count("error:") == 1 and message in done.stderr
