"""From the values of an output to the one number per image that is explained.

A reduction is a number y(v) with a seed g(v) such that sum(g v) = y: what the values hand on to the network adds up to
what is explained, so the ledger closes. Where y is a weighted sum, g is its gradient, and the explanation is that of a
linear layer behind the network. A norm hands each value its share, v^2 / |v|; a cosine is a sum with the norms held
constant, as normalizations hold their statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """value: (values [N, M], weights [N, M]) -> [N]; seed: the same -> [N, M], with sum(seed * values) = value."""

    value: Callable[[Tensor, Tensor], Tensor]
    seed: Callable[[Tensor, Tensor], Tensor]


def _total(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum(1)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum(1) / weights.sum(1)


def _mean_seed(values: Tensor, weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True)


def _largest(values: Tensor, weights: Tensor) -> Tensor:
    return values.masked_fill(weights == 0, -torch.inf).amax(1)


def _largest_seed(values: Tensor, weights: Tensor) -> Tensor:
    place = values.masked_fill(weights == 0, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(values).scatter_(1, place, 1.0)


def _norm(values: Tensor, weights: Tensor) -> Tensor:
    return _length(values * (weights != 0))[:, 0]


def _norm_seed(values: Tensor, weights: Tensor) -> Tensor:
    chosen = values * (weights != 0)
    return _over(chosen, _length(chosen))


def _cosine(values: Tensor, weights: Tensor) -> Tensor:
    return (values * _cosine_seed(values, weights)).sum(1)


def _cosine_seed(values: Tensor, weights: Tensor) -> Tensor:
    chosen = values * (weights != 0)
    return _over(weights, _length(weights) * _length(chosen))


def _length(values: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return length


def _over(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, 0 where the scale is 0."""
    return torch.where(scale == 0, torch.zeros_like(values), values / scale)


REDUCTIONS: Mapping[str, Reduction] = {
    "sum": Reduction(_total, lambda values, weights: weights),
    "mean": Reduction(_mean, _mean_seed),
    "max": Reduction(_largest, _largest_seed),
    "norm": Reduction(_norm, _norm_seed),
    "cosine": Reduction(_cosine, _cosine_seed),
}
