"""Products of matrices whose axes were folded together for `mm` and `bmm`: linear layers and products on all axes.

Core ATen has products of two matrices, and of two batches of matrices, only. What has more axes is reshaped to these
and back, and what is broadcast is written out; here it is one operator again, on the values as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion.idle import sizes_of
from fusion.network import Network
from fusion.normalize import argument, is_call, rewrite

aten = torch.ops.aten


def recognize_products(network: Network) -> None:
    """Write linear and matmul for what is reshaped before and after a product, in place. Needs shapes, and gives new
    nodes theirs."""
    for node in list(network.graph.nodes):
        new = (
            _late(network, node) or _linear(network, node) or _matmul(network, node) or _biased(network, node)
        )
        if new is not None:
            if not new.meta.get("layer") and new.op == "call_function":
                new.meta = {**new.meta, "layer": node.meta.get("layer", "")}
            node.replace_all_uses_with(new)
            network.graph.erase_node(node)  # or what it read would seem to have another reader


# --- linear layers ----------------------------------------------------------------------------------------------------
def _late(network: Network, node: fx.Node) -> fx.Node | None:
    """x W and x W + b where W or b were computed from constants, and are known only now."""
    if is_call(node, "addmm"):
        bias, x, w = node.args
        if argument(node, "beta") != 1 or argument(node, "alpha") != 1:
            return None
    elif is_call(node, "mm", "matmul"):
        bias, (x, w) = None, node.args[:2]
    else:
        return None
    matrix, vector = network.constant(w), network.constant(bias)
    if matrix is None or matrix.ndim != 2 or network.constant(x) is not None:
        return None
    if bias is not None and (vector is None or tuple(vector.shape) != tuple(matrix.shape[1:])):
        return None
    weight = network.add_constant(str(w.target), matrix.t().contiguous(), before=node)  # type: ignore[union-attr]
    return _called(network, node, node, aten.linear.default, x, weight, *([] if bias is None else [bias]))


def _linear(network: Network, node: fx.Node) -> fx.Node | None:
    """reshape(linear(reshape(x))) with all axes but the last folded together is linear(x)."""
    layer: Any = node.args[0] if is_call(node, "reshape") else None
    if not is_call(layer, "linear") or len(layer.users) != 1 or not is_call(layer.args[0], "reshape"):
        return None
    source: Any = layer.args[0].args[0]
    weight = network.constant(layer.args[1])
    before, after = sizes_of(source), sizes_of(node)
    if weight is None or len(before) < 2 or before[:-1] != after[:-1]:
        return None
    if before[-1][1] != weight.shape[1] or after[-1][1] != weight.shape[0]:
        return None
    return _called(network, node, layer, aten.linear.default, source, *layer.args[1:])


def _biased(network: Network, node: fx.Node) -> fx.Node | None:
    """What is added to a linear layer that was in the way of its bias."""
    if not is_call(node, "add") or not any(is_call(n, "linear") for n in node.all_input_nodes):
        return None
    function = rewrite.get("add")
    assert function is not None
    with network.graph.inserting_before(node):
        new = function(network, node)
    if new is None or network.constant(new.args[2]) is None:
        return None
    new.meta = {**node.meta, "layer": new.meta.get("layer", "")}
    return new


# --- products of values -----------------------------------------------------------------------------------------------
def _matmul(network: Network, node: fx.Node) -> fx.Node | None:
    """reshape(bmm(reshape(a), reshape(b))) with the axes before the last two folded together is matmul(a, b)."""
    product: Any = node.args[0] if is_call(node, "reshape") else None
    if not is_call(product, "bmm") or len(product.users) != 1:
        return None
    answer = sizes_of(node)
    factors = []
    for factor in product.args[:2]:
        source = factor.args[0] if is_call(factor, "reshape") else None
        sizes = [] if source is None else sizes_of(source)
        if len(sizes) < 3 or sizes[:-2] != answer[:-2] or sizes[-2:] != sizes_of(factor)[-2:]:
            return None
        factors.append(source)
    if sizes_of(product)[-2:] != answer[-2:]:
        return None
    a, b = _unrepeated(factors, [size for _, size in answer[:-2]])
    new = _called(network, node, product, aten.matmul.default, a, b)
    return _late(network, new) or new


def _unrepeated(factors: list[Any], leading: list[int]) -> list[Any]:
    """The factors before they were repeated along leading axes, which the product does by itself; as they are where
    both would lack an axis."""
    bare = [node.args[0] if is_call(node, "expand") else node for node in factors]
    sizes = [list(node.meta["example"])[:-2] for node in bare]
    alike = min(len(node.meta["example"]) for node in bare) >= 2
    return bare if alike and _broadcast(*sizes) == leading else factors


def _broadcast(a: list[int], b: list[int]) -> list[int]:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    padded = [1] * (len(longer) - len(shorter)) + shorter
    return [max(pair) for pair in zip(longer, padded, strict=True)]


def _called(network: Network, node: fx.Node, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call in the place of `node`, with its shape and the layer of `like`."""
    with network.graph.inserting_before(node):
        new = network.graph.call_function(target, args)
    new.meta = {**node.meta, "layer": like.meta.get("layer") or node.meta.get("layer", "")}
    return new
