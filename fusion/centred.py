"""Activations that a constant centres: f(x) - f(0), as softplus(x) - log 2 in low-curvature networks.

The constant belongs to the activation. Folded into the layer behind, it would be a bias there, and an input of zero
would have relevance. (Srinivas et al. 2022, arXiv:2206.07144.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fusion.network import Network, op_name
from fusion.normalize import argument

# Element-wise operators that are not zero at zero.
_ACTIVATIONS = {"softplus", "sigmoid", "hardsigmoid", "exp", "cos"}


def centred_activation(network: Network, node: Any) -> fx.Node | None:
    """The activation f where the node is c f(x) - c f(0), c a constant factor or divisor; None where it is not."""
    if not _is(node, "add", "sub") or argument(node, "alpha", 1) != 1:
        return None
    chain, constant = node.args[:2]
    shift = _constant(network, constant)
    if shift is None:
        return None
    factors: list[tuple[str, Tensor]] = []
    while _is(chain, "mul", "div") and (factor := _constant(network, chain.args[1])) is not None:
        factors.append((op_name(chain), factor))
        chain = chain.args[0]
    if not _is(chain, *_ACTIVATIONS):
        return None
    zero = torch.zeros((), dtype=node.meta["dtype"])
    at_zero: Tensor = chain.target(zero, *chain.args[1:], **chain.kwargs)
    for op, factor in reversed(factors):
        at_zero = at_zero * factor if op == "mul" else at_zero / factor
    total = at_zero + shift if op_name(node) == "add" else at_zero - shift
    # The constant is f(0) as written down, so they differ by rounding at most.
    rounding = 8 * torch.finfo(total.dtype).eps * at_zero.abs()
    return chain if bool((total.abs() <= rounding).all()) else None


def _is(node: Any, *ops: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in ops


def _constant(network: Network, value: Any) -> Tensor | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    return network.constant(value)
