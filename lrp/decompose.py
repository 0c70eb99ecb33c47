"""Compound operators as the sums and products that they are, so that the rules for those serve them too.

addcmul(t, a, b) is t + a b: no rule of its own could say more than the rules of the product and of the sum. What is
taken apart here computes the same values, in a copy of the network; layers keep their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fusion.network import Network, annotate, op_name
from fusion.normalize import argument
from fusion.registry import Registry

aten = torch.ops.aten
# (network, node) -> the node to read instead.
parts: Registry[Callable[[Network, fx.Node], fx.Node]] = Registry()


def decomposed(network: Network) -> Network:
    """The network with its compound operators taken apart; the network itself where it has none."""
    if not any(n.op == "call_function" and parts.get(op_name(n)) for n in network.graph.nodes):
        return network
    result = network.copy()
    for node in list(result.graph.nodes):
        function = parts.get(op_name(node)) if node.op == "call_function" else None
        if function is None:
            continue
        with result.graph.inserting_before(node):
            replacement = function(result, node)
        node.replace_all_uses_with(replacement)
        result.graph.erase_node(node)
    return annotate(result)


def _call(network: Network, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    node = network.graph.call_function(target, args)
    node.meta = {"layer": like.meta.get("layer", "")}
    return node


def _times(network: Network, like: fx.Node, value: Any, number: Any) -> Any:
    return value if number == 1 else _call(network, like, aten.mul.Tensor, value, number)


@parts("addcmul", "addcdiv")
def _add_product(network: Network, node: fx.Node) -> fx.Node:
    """t + v a b, or t + v a / b."""
    t, a, b = node.args[:3]
    target = aten.mul.Tensor if op_name(node) == "addcmul" else aten.div.Tensor
    product: fx.Node = _call(network, node, target, a, b)
    product = _times(network, node, product, argument(node, "value", 1))
    return _call(network, node, aten.add.Tensor, t, product)


@parts("addmm", "baddbmm", "addbmm", "addmv")
def _add_matrix_product(network: Network, node: fx.Node) -> fx.Node:
    """beta t + alpha A B; addbmm also sums over the batch."""
    t, a, b = node.args[:3]
    product: fx.Node = _call(network, node, aten.matmul.default, a, b)
    if op_name(node) == "addbmm":
        product = _call(network, node, aten.sum.dim_IntList, product, [0])
    total: fx.Node = _times(network, node, product, argument(node, "alpha", 1))
    if argument(node, "beta", 1) == 0:
        return total  # whatever t is, NaN included
    return _call(network, node, aten.add.Tensor, _times(network, node, t, argument(node, "beta", 1)), total)


@parts("glu")
def _gated_linear_unit(network: Network, node: fx.Node) -> fx.Node:
    """a sigmoid(b), a and b the halves of the input."""
    source: Any = node.args[0]
    axis = argument(node, "dim")
    half = source.meta["shape"][axis] // 2
    a = _call(network, node, aten.slice.Tensor, source, axis, 0, half)
    b = _call(network, node, aten.slice.Tensor, source, axis, half, 2 * half)
    return _call(network, node, aten.mul.Tensor, a, _call(network, node, aten.sigmoid.default, b))
