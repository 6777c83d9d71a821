"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), and clipping by the norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..arrays import Array, accumulator, namespace


class AdamW:
    """Running means of gradients and of their squares, and the step that they give.

        m = beta1 m + (1 - beta1) g          w -= rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        v = beta2 v + (1 - beta2) g^2                   + weight_decay w)

    Parameters
    ----------
    weights : dict
        By name; `step` changes them in place. Matrices decay, vectors do not.
    beta1, beta2, eps, weight_decay : float
    """

    def __init__(
        self, weights: Mapping[str, Array], beta1: float, beta2: float, eps: float, weight_decay: float
    ) -> None:
        self.weights, self.beta1, self.beta2, self.eps, self.weight_decay = weights, beta1, beta2, eps, weight_decay
        self.means = {name: namespace(weight).zeros_like(weight) for name, weight in weights.items()}
        self.squares = {name: namespace(weight).zeros_like(weight) for name, weight in weights.items()}
        self.steps = 0

    def step(self, gradients: Mapping[str, Array], rate: float) -> None:
        """Move the weights against their gradients."""
        self.steps += 1
        to_mean, to_square = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        for name, weight in self.weights.items():
            mean, square, gradient = self.means[name], self.squares[name], gradients[name]
            mean += (1 - self.beta1) * (gradient - mean)
            square += (1 - self.beta2) * (gradient * gradient - square)
            if weight.ndim > 1:
                weight *= 1 - rate * self.weight_decay
            weight -= rate / to_mean * mean / (namespace(weight).sqrt(square / to_square) + self.eps)


def clip(gradients: Mapping[str, Array], most: float) -> float:
    """Scale the gradients, in place, so that their norm is at most `most`; return the norm that they had."""
    total = 0.0
    for gradient in gradients.values():
        flat = gradient.reshape(-1).astype(accumulator(gradient.dtype), copy=False)
        total += float(flat @ flat)
    norm = math.sqrt(total)
    if norm > most:
        for gradient in gradients.values():
            gradient *= most / norm
    return norm
