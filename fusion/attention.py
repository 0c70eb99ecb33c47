"""Attention as torch spells it out, two products around a softmax with the scale's root on either side, as one node.

A row of weights that a mask closes altogether gives zeros, as in the operator; `where` says so behind the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion.network import Network
from fusion.normalize import argument, is_call, put

aten = torch.ops.aten


def recognize_attention(network: Network) -> None:
    """Write scaled_dot_product_attention where it is spelled out, in place. Needs shapes, and gives new nodes
    theirs."""
    for node in list(network.graph.nodes):
        if is_call(node, "matmul", "bmm"):
            _attention(network, node)


def _attention(network: Network, node: fx.Node) -> None:
    weights, value = node.args[:2]
    softmax: Any = _unguarded(weights)
    rank = len(node.meta["shape"])
    if softmax is None or int(softmax.args[1]) not in (-1, rank - 1):
        return
    scores: Any = softmax.args[0]
    mask = None
    product: Any = scores
    if is_call(scores, "add") and argument(scores, "alpha", 1) == 1:
        product, mask = scores.args[:2]
    if not is_call(product, "matmul", "bmm"):
        return
    query, key = (_scaled(factor) for factor in product.args[:2])
    if query is None or key is None or query[1] != key[1]:
        return
    with network.graph.inserting_before(node):
        rows = _swapped(network, key[0])
    target, scale = aten.scaled_dot_product_attention.default, query[1] * key[1]
    put(network, node, target, query[0], rows, value, mask, 0.0, False, scale=scale)


def _unguarded(node: Any) -> fx.Node | None:
    """The softmax of where(no score of the row is above -inf, 0, softmax)."""
    if (
        not is_call(node, "where")
        or not is_call(node.args[0], "logical_not")
        or not is_call(node.args[2], "softmax")
    ):
        return None
    some, softmax = node.args[0].args[0], node.args[2]
    if (
        not is_call(some, "any")
        or not is_call(some.args[0], "logical_not")
        or not is_call(some.args[0].args[0], "eq")
    ):
        return None
    compared = some.args[0].args[0]
    same = compared.args[0] is softmax.args[0] and compared.args[1] == float("-inf")
    return softmax if same else None


def _scaled(node: Any) -> tuple[fx.Node, float] | None:
    """(x, number) where the node is their product."""
    if not is_call(node, "mul") or not isinstance(node.args[1], int | float):
        return None
    return node.args[0], float(node.args[1])


def _swapped(network: Network, node: Any) -> Any:
    """A value with its last two axes swapped: what such a swap read, or a new one."""
    if is_call(node, "permute"):
        order = list(node.args[1])
        if order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
            return node.args[0]
    new = network.graph.call_function(aten.transpose.int, (node, -1, -2))
    for name in ("shape", "example"):
        sizes = list(node.meta[name])
        new.meta[name] = (*sizes[:-2], sizes[-1], sizes[-2])
    new.meta |= {"dtype": node.meta["dtype"], "layer": node.meta.get("layer", "")}
    return new
