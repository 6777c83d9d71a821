"""Tiny random models of Hugging Face's families, and their loss and gradients in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,  # tied, random weights repeat a token
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ALTERNATING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES)),
    "mistral with a window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=7)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SIZES, **ALTERNATING, query_pre_attn_scalar=16, attn_logit_softcapping=5.0)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, **ALTERNATING, query_pre_attn_scalar=16)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, **ALTERNATING, **EXPERTS)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, attention_multiplier=0.2)),
}


def tiny(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):  # small ones would be nearly no sinks
                weight.copy_(torch.linspace(0, 2, weight.numel()))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 97, shape, generator=torch.Generator().manual_seed(2))


def gradients(model: Any) -> list[Tensor]:
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def in_one_process(model: Any, documents: list[Tensor], labels: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Return loss and gradients of documents that are computed one by one; the model's gradients are none again."""
    model.set_attn_implementation("eager")
    total, targets = torch.zeros(()), 0
    for ids, target in zip(documents, labels, strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1].float(), target[1:], reduction="sum")
        targets += int((target[1:] != -100).sum())
    (total / targets).backward()
    result = gradients(model)
    model.zero_grad()
    return float(total.detach()) / targets, result
