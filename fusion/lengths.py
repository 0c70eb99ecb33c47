"""The root of a sum of squares, as one operator: the length of a vector, which has a rule of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion.network import Network
from fusion.normalize import argument, is_call, put

aten = torch.ops.aten


def recognize_lengths(network: Network) -> None:
    """Write linalg_vector_norm for sum(x ** 2) ** (1/2), in place. Needs shapes, and gives new nodes theirs."""
    for node in list(network.graph.nodes):
        total = _rooted(node)
        if not is_call(total, "sum") or total.target is not aten.sum.dim_IntList:
            continue
        squares: Any = total.args[0]
        if not is_call(squares, "pow") or squares.args[1] != 2 or argument(total, "dtype") is not None:
            continue
        axes, keep = argument(total, "dim"), argument(total, "keepdim")
        put(network, node, aten.linalg_vector_norm.default, squares.args[0], 2, axes or None, keep)


def _rooted(node: fx.Node) -> Any:
    """What the node is the square root of."""
    if is_call(node, "sqrt") or (is_call(node, "pow") and node.args[1] == 0.5):
        return node.args[0]
    return None
