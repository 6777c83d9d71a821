"""Tensors, layers of torch and models of Hugging Face over MPI ranks."""

from __future__ import annotations

from mpi4py import MPI  # noqa: F401  before torch, whose libraries may not find their place after MPI's

from .function import attention

__all__ = ["attention"]
