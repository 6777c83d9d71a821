"""Tensors, layers of torch and models of Hugging Face over MPI ranks.

- `attention`: any algorithm as a function of tensors with a gradient
- `AttentionLayer`, `MeshAttention`: layers with projections, on this rank's tokens
- `SequenceParallel`: the full sequence on rank 0 in, the full output on rank 0 out
- `shard`: a model of Hugging Face over the ranks; importing this module registers `attn_implementation="mpiattn"`
- `sum_gradients`, `broadcast`: of weights
"""

from __future__ import annotations

import importlib.util

from mpi4py import MPI  # noqa: F401  before torch, whose libraries may not find their place after MPI's

from .function import attention
from .layers import AttentionLayer, MeshAttention
from .sequence_parallel import SequenceParallel
from .shard import shard
from .weights import broadcast, sum_gradients

if importlib.util.find_spec("transformers"):
    from . import hugging_face

    hugging_face.register()

__all__ = ["AttentionLayer", "MeshAttention", "SequenceParallel", "attention", "broadcast", "shard", "sum_gradients"]
