"""One spelling per operation: what exporters write differently becomes the same nodes before any pass looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fusion.network import Network, is_size_arithmetic, op_name
from fusion.registry import Registry

aten = torch.ops.aten
Rewrite = Callable[[Network, fx.Node], "fx.Node | None"]

# Functions that return the node to read instead of this one, or None to leave it.
rewrite: Registry[Rewrite] = Registry()


def normalize(network: Network) -> None:
    """Apply every registered rewrite once, in execution order, in place."""
    for node in list(network.graph.nodes):
        called = node.op == "call_function" and not is_size_arithmetic(node)
        function = rewrite.get(op_name(node)) if called else None
        if function is None:
            continue
        with network.graph.inserting_before(node):
            replacement = function(network, node)
        if replacement is not None and replacement is not node:
            if not replacement.meta.get("layer") and replacement.op == "call_function":
                replacement.meta = {**replacement.meta, "layer": node.meta.get("layer", "")}
            node.replace_all_uses_with(replacement)
    for node in reversed(list(network.graph.nodes)):
        # The graph is functional: what nobody reads has no effect, guards and inactive dropout included.
        if node.op in ("call_function", "get_attr") and not node.users:
            network.graph.erase_node(node)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by its schema name, whether it was passed by position or by keyword."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, arg in enumerate(node.target._schema.arguments):
        if arg.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if not arg.kwarg_only and position < len(node.args):
                return node.args[position]
            return arg.default_value if arg.has_default_value() else default
    return default


def is_call(node: Any, *ops: str) -> bool:
    """Whether a node is a call of one of these operators on tensors; arithmetic on sizes bears the same names."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and op_name(node) in ops
        and not is_size_arithmetic(node)
    )


def emit(network: Network, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A call that stands for (a part of) another one, whose layer and shape it is given."""
    node = network.graph.call_function(target, args)
    node.meta = {**like.meta}
    return node


def put(network: Network, node: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A call in the place of another one, whose layer and shape it is given: what read that one reads it."""
    with network.graph.inserting_before(node):
        new = emit(network, node, target, *args)
    new.kwargs = kwargs
    node.replace_all_uses_with(new)
    return new


DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


@rewrite(*DROPOUTS)
def _inactive_dropout(network: Network, node: fx.Node) -> fx.Node | None:
    return node.args[0] if not argument(node, "train") else None  # type: ignore[return-value]


@rewrite("alias", "clone", "contiguous", "detach", "lift_fresh_copy", "lift_fresh", "positive", "detach_copy")
def _identity(network: Network, node: fx.Node) -> fx.Node | None:
    return node.args[0]  # type: ignore[return-value]


@rewrite("copy", "fill", "zero")
def _written_over(network: Network, node: fx.Node) -> fx.Node | None:
    """What is written over a tensor, in its shape and type: aten has no derivative for the copy itself."""
    old, new = (*node.args, 0)[:2]
    if not isinstance(new, fx.Node):
        return emit(network, node, aten.full_like.default, old, new)
    expanded = emit(network, node, aten.expand_as.default, new, old)
    return emit(network, node, aten.type_as.default, expanded, old)


@rewrite("constant_pad_nd")
def _empty_pad(network: Network, node: fx.Node) -> fx.Node | None:
    """Padding by nothing, as networks write it that pad to even sizes."""
    return node.args[0] if all(width == 0 for width in node.args[1]) else None  # type: ignore[return-value,union-attr]


@rewrite("convolution")
def _convolution(network: Network, node: fx.Node) -> fx.Node | None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    rank = len(stride)  # type: ignore[arg-type]
    if transposed:
        target = {
            1: aten.conv_transpose1d.default,
            2: aten.conv_transpose2d.input,
            3: aten.conv_transpose3d.input,
        }[rank]
        return emit(network, node, target, x, weight, bias, stride, padding, output_padding, groups, dilation)
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[rank]
    return emit(network, node, target, x, weight, bias, stride, padding, dilation, groups)


def _transposed(network: Network, node: fx.Node, weight: fx.Node) -> fx.Node:
    # Folded to a constant afterwards where the weight is one.
    return emit(network, node, aten.t.default, weight)


def _is_matrix(network: Network, value: Any) -> bool:
    tensor = network.constant(value)
    return tensor is not None and tensor.ndim == 2


@rewrite("addmm")
def _addmm(network: Network, node: fx.Node) -> fx.Node | None:
    bias, x, weight = node.args
    scaled = argument(node, "beta") != 1 or argument(node, "alpha") != 1
    vector = network.constant(bias)
    source = undo_transpose(weight)
    if scaled or vector is None or vector.ndim != 1:
        return None
    if source is not None and _is_matrix(network, source):
        return emit(network, node, aten.linear.default, x, source, bias)
    if _is_matrix(network, weight):
        return emit(network, node, aten.linear.default, x, _transposed(network, node, weight), bias)  # type: ignore[arg-type]
    return None


@rewrite("mm", "matmul")
def _matmul(network: Network, node: fx.Node) -> fx.Node | None:
    x, weight = node.args
    return None if network.constant(x) is not None else as_linear(network, node, x, weight)


def as_linear(network: Network, node: fx.Node, x: Any, weight: Any) -> fx.Node | None:
    """The linear layer x W, None where W is no constant matrix or the transpose of one."""
    source = undo_transpose(weight)
    if source is not None and _is_matrix(network, source):
        return emit(network, node, aten.linear.default, x, source)
    if _is_matrix(network, weight):
        return emit(network, node, aten.linear.default, x, _transposed(network, node, weight))
    return None


@rewrite("add")
def _bias_of_linear(network: Network, node: fx.Node) -> fx.Node | None:
    # x W + b as two nodes (older exporters) is one linear layer, and its rule needs to see the bias.
    if len(node.args) < 2 or argument(node, "alpha", 1) != 1:
        return None
    for layer, bias in (node.args[:2], node.args[1::-1]):
        vector = network.constant(bias)
        if (
            isinstance(layer, fx.Node)
            and op_name(layer) == "linear"
            and len(layer.users) == 1
            and (len(layer.args) < 3 or layer.args[2] is None)
            and vector is not None
            and vector.numel() == _rows(network, layer)
            and vector.ndim <= 2  # more axes than the layer's output would change its shape
            and vector.shape[-1:] == (vector.numel(),)
        ):
            flat = bias if vector.ndim == 1 else emit(network, node, aten.view.default, bias, [-1])
            return emit(network, layer, aten.linear.default, layer.args[0], layer.args[1], flat)
    return None


@rewrite("addcmul", "addcdiv")
def _sum_of_product(network: Network, node: fx.Node) -> fx.Node:
    """t + v a b, or t + v a / b: constants among them are scales and shifts, which fold."""
    t, a, b = node.args[:3]
    target = aten.mul.Tensor if op_name(node) == "addcmul" else aten.div.Tensor
    value = argument(node, "value", 1)
    product = emit(network, node, target, a, b)
    product = product if value == 1 else emit(network, node, aten.mul.Tensor, product, value)
    return emit(network, node, aten.add.Tensor, t, product)


def _rows(network: Network, layer: fx.Node) -> int:
    weight = layer.args[1]
    tensor: Tensor | None = network.constant(weight)
    if tensor is None and isinstance(weight, fx.Node) and op_name(weight) == "t":
        return network.constants[str(weight.args[0].target)].shape[1]  # type: ignore[union-attr]
    return -1 if tensor is None else tensor.shape[0]


def undo_transpose(node: Any) -> fx.Node | None:
    """The matrix M where node is M transposed."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    swapped = op_name(node) == "t" or (
        op_name(node) == "transpose" and set(node.args[1:]) in ({0, 1}, {-1, -2})
    )
    swapped = swapped or (op_name(node) == "permute" and list(node.args[1]) == [1, 0])  # type: ignore[arg-type]
    return node.args[0] if swapped else None  # type: ignore[return-value]


@rewrite("view", "_unsafe_view")
def _view(network: Network, node: fx.Node) -> fx.Node | None:
    # A functional graph says nothing about strides, and a view would depend on them.
    if node.target in (aten.view.default, aten._unsafe_view.default):
        return emit(network, node, aten.reshape.default, *node.args)
    return None


@rewrite("max", "min")
def _greater_or_less(network: Network, node: fx.Node) -> fx.Node | None:
    # torch.max(a, b); with one tensor it is a reduction.
    twins = {aten.max.other: aten.maximum.default, aten.min.other: aten.minimum.default}
    twin = twins.get(node.target)  # type: ignore[call-overload]
    return None if twin is None else emit(network, node, twin, *node.args)


_PADS = {
    ("reflect", 2): aten.reflection_pad1d.default,
    ("reflect", 4): aten.reflection_pad2d.default,
    ("reflect", 6): aten.reflection_pad3d.default,
    ("replicate", 2): aten.replication_pad1d.default,
    ("replicate", 4): aten.replication_pad2d.default,
    ("replicate", 6): aten.replication_pad3d.default,
}


@rewrite("pad")
def _pad(network: Network, node: fx.Node) -> fx.Node | None:
    pads, mode = argument(node, "pad"), argument(node, "mode", "constant")
    if all(width == 0 for width in pads):
        return node.args[0]  # type: ignore[return-value]
    if mode == "constant":
        return emit(
            network, node, aten.constant_pad_nd.default, node.args[0], pads, argument(node, "value") or 0
        )
    target = _PADS.get((mode, len(pads)))
    return None if target is None else emit(network, node, target, node.args[0], pads)
