"""Training beside torch: the same model written in torch's operations, its AdamW, the same weights and sequences."""

from __future__ import annotations

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
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
}  # fmt: skip
STEPS = 200


def plan(dtype: str) -> Plan:
    training = {"steps": STEPS, "tokens": 16, "batch": 4, "learning_rate": 3e-3, "warmup": 10, "dtype": dtype}
    return Plan.from_tables({"model": MODEL, "training": training})


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


def by_torch(given: Plan) -> list[float]:
    """Return the loss of each step."""
    from mpi4py import MPI

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
        angles = [torch.tensor(turn[order]) for turn in source.llama.angles(positions)]
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


@pytest.mark.mpi(sizes=[1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-8), ("float32", 1e-3)])
def test_losses_are_torchs(comm: Any, dtype: str, tolerance: float) -> None:
    """Over 200 steps; on 4 ranks as 2 sequences at a time, each on 2 ranks."""
    given = plan(dtype)
    right = comm.bcast(patiently(comm, lambda: by_torch(given)))
    trainer = Trainer(comm, given, TEXT, data=2 if comm.Get_size() == 4 else 1)
    losses = [trainer.train() for _ in range(STEPS)]
    trainer.free()
    assert right[-1] < 0.8 * right[0]
    assert np.abs(np.array(losses) - right).max() < tolerance
