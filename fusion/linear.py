"""Linear layers as passes and rules see them: which weights, which axes, which bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fusion.network import Network, op_name
from fusion.normalize import argument

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearLayer:
    """A convolution, transposed convolution or linear layer with constant weights.

    `node` computes it, `output` is the node to read: another one where a bias that varies over space (a "bias
    map", as zero padding behind a folded normalization leaves) is added behind the node. All tensors are in the
    layout of the ATen call.
    """

    node: fx.Node
    output: fx.Node
    kind: str  # "conv", "conv_transpose" or "linear"
    rank: int  # spatial dimensions, 0 for linear
    weight: fx.Node
    bias: fx.Node | None
    bias_map: fx.Node | None
    groups: int

    @property
    def source(self) -> fx.Node:
        """The node whose values the layer reads."""
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def name(self) -> str:
        return str(self.node.meta.get("layer") or self.node.name)

    @property
    def sees_neighbours(self) -> bool:
        """Whether its kernel is larger than one position."""
        return self.rank > 0 and any(size > 1 for size in self.weight.meta["shape"][2:])

    @property
    def output_axis(self) -> int:
        return 1 if self.rank else -1

    def function(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """(x, weight, bias) -> output, without the bias map."""
        target: Callable[..., Tensor] = self.node.target  # type: ignore[assignment]
        rest, kwargs = self.node.args[3:], self.node.kwargs
        extra = {k: v for k, v in kwargs.items() if k not in ("bias", "weight", "input")}
        return lambda x, weight, bias: target(x, weight, bias, *rest, **extra)

    def scale_outputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        """W'_o = s_o W_o."""
        if self.kind == "conv_transpose":
            grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
            shaped = scale.reshape(self.groups, 1, -1, *[1] * self.rank)
            return (grouped * shaped).reshape(weight.shape)
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))

    def scale_inputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        """W'_oc = W_oc s_c."""
        if self.kind == "conv_transpose":
            return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        shaped = scale.reshape(self.groups, 1, -1, *[1] * self.rank)
        return (grouped * shaped).reshape(weight.shape)


_KINDS: dict[str, tuple[str, int]] = {
    "conv1d": ("conv", 1),
    "conv2d": ("conv", 2),
    "conv3d": ("conv", 3),
    "conv_transpose1d": ("conv_transpose", 1),
    "conv_transpose2d": ("conv_transpose", 2),
    "conv_transpose3d": ("conv_transpose", 3),
    "linear": ("linear", 0),
}


def linear_layer(network: Network, node: Any) -> LinearLayer | None:
    """The linear layer that this node computes, None where it is none or its weights are no constants."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or op_name(node) not in _KINDS:
        return None
    kind, rank = _KINDS[op_name(node)]
    weight, bias = argument(node, "weight"), argument(node, "bias")
    if network.constant(weight) is None or (bias is not None and network.constant(bias) is None):
        return None
    # A layer with a bias vector of its own keeps an addition behind it apart: one bias, or one map, never both.
    output, bias_map = (node, None) if bias is not None else _behind_bias_map(network, node)
    return LinearLayer(node, output, kind, rank, weight, bias, bias_map, int(argument(node, "groups", 1)))


def linear_layer_ending_at(network: Network, node: Any) -> LinearLayer | None:
    """The linear layer whose `output` is this node."""
    layer = linear_layer(network, node)
    if layer is None and isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == "add":
        layer = linear_layer(network, node.args[0])
    return layer if layer is not None and layer.output is node else None


def _behind_bias_map(network: Network, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_function" and users[0].target is aten.add.Tensor:
        add = users[0]
        shape = node.meta.get("shape")
        if add.args[0] is node and len(add.args) == 2 and not add.kwargs:
            constant = network.constant(add.args[1])
            per_sample = None if shape is None else tuple(size or 1 for size in shape)
            if constant is not None and tuple(constant.shape) == per_sample:
                return add, add.args[1]  # type: ignore[return-value]
    return node, None
