"""Training beside torch: the same model written in torch's operations, its AdamW, the same weights and sequences."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpiattn.commands.root import patiently
from mpiattn.models.llama import full
from mpiattn.models.plan import Plan
from mpiattn.models.training import TRAINING, Trainer

TEXT = (Path(__file__).parent.parent.parent / "LICENSE").read_bytes()
MODEL = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
TOLERANCES = [("float64", 1e-8), ("float32", 1e-3)]


def plan(dtype: str, blocks: int) -> Plan:
    training = {"steps": 200, "tokens": 16, "batch": 4, "learning_rate": 3e-3, "warmup": 10, "dtype": dtype}
    return Plan.from_tables({"model": {**MODEL, "num_hidden_layers": blocks}, "training": training})


def loss_of(weights: dict[str, Any], given: Plan, angles: Any, tokens: Any, targets: Any) -> Any:
    """Return the mean loss of the model, by torch."""
    config = given.model
    cos, sin = angles

    def norm(x: Any, name: str) -> Any:
        return F.rms_norm(x, x.shape[-1:], weights[name], config.rms_norm_eps)

    def turned(x: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    table = weights["model.embed_tokens.weight"]
    x = F.embedding(tokens, table)
    for number in range(config.num_hidden_layers):
        h = norm(x, full(number, "input_layernorm"))
        q, k, v = (
            (h @ weights[full(number, f"self_attn.{n}_proj")].T).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            for n in "qkv"
        )
        out = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + out.transpose(1, 2).flatten(2) @ weights[full(number, "self_attn.o_proj")].T
        h = norm(x, full(number, "post_attention_layernorm"))
        gate, up = (h @ weights[full(number, f"mlp.{n}_proj")].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[full(number, "mlp.down_proj")].T
    return F.cross_entropy((norm(x, "model.norm.weight") @ table.T).flatten(0, 1), targets.flatten())


@cache
def by_torch(dtype: str, blocks: int) -> list[float]:
    """Return the loss of each step."""
    from mpi4py import MPI

    given = plan(dtype, blocks)
    torch.set_num_threads(1)
    source = Trainer(MPI.COMM_SELF, given, TEXT)  # of the first weights and the sequences
    weights = {name: torch.tensor(weight, requires_grad=True) for name, weight in source.llama.weights.items()}
    matrices, vectors = ([w for w in weights.values() if (w.ndim > 1) == flag] for flag in (True, False))
    groups = [{"params": matrices, "weight_decay": given.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(given.beta1, given.beta2), eps=given.eps)
    losses = []
    for step in range(given.steps):
        tokens, targets, positions = source.drawn(TRAINING, step)
        order = np.argsort(positions)
        angles = [torch.tensor(turn[order][:, 1]) for turn in source.llama.angles(positions)]
        adam.zero_grad()
        loss = loss_of(weights, given, angles, torch.tensor(tokens[:, order]), torch.tensor(targets[:, order]))
        loss.backward()
        norm = torch.sqrt(sum((w.grad**2).sum() for w in weights.values()))
        for weight in weights.values():
            weight.grad *= min(1.0, given.clip / float(norm))
        for group in adam.param_groups:
            group["lr"] = given.rate(step)
        adam.step()
        losses.append(float(loss.detach()))
    return losses


def differences(comm: Any, dtype: str, algorithm: str) -> Any:
    """Return how far the loss of each step is from torch's; one block will do where ranks share cores."""
    blocks = 2 if comm.size == 1 else 1
    right = comm.bcast(patiently(comm, lambda: by_torch(dtype, blocks)))
    assert right[-1] < 0.8 * right[0]
    trainer = Trainer(comm, plan(dtype, blocks), TEXT, algorithm)
    losses = [trainer.train() for _ in right]
    trainer.free()
    return np.abs(np.array(losses) - right)


@pytest.mark.mpi(sizes=[1, 2, 4])
@pytest.mark.parametrize("algorithm", ["ring", "mesh"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_losses_are_torchs(comm: Any, dtype: str, tolerance: float, algorithm: str) -> None:
    """Over 200 steps."""
    assert differences(comm, dtype, algorithm).max() < tolerance


@pytest.mark.mpi(sizes=[4])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_losses_on_two_ranks_are_torchs(comm: Any, dtype: str, tolerance: float) -> None:
    """Of the 4 ranks, two train by ring while the others train by mesh."""
    pair = comm.Split(comm.rank // 2)
    assert differences(pair, dtype, ("ring", "mesh")[comm.rank // 2]).max() < tolerance
    pair.Free()
