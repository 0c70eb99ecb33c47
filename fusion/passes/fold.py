"""What a fold is: the layers that took a normalization, or the reason why it cannot go there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fusion.linear import Affine, LinearLayer
from fusion.network import Network

aten = torch.ops.aten


@dataclass(frozen=True)
class Fold:
    """`into` names the layers that took the affine map (it is then gone); empty with a `reason` where none could."""

    into: tuple[str, ...] = ()
    reason: str = ""


Pass = Callable[[Network, Affine], Fold]


def update_layer(network: Network, layer: LinearLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer new weights (and a bias vector) in its own dtype, leaving other readers of the old ones alone."""
    _update(network, layer, 1, layer.weight, weight, f"{layer.name}.weight")
    if bias is None:
        return
    _update(network, layer, 2, layer.bias, bias, f"{layer.name}.bias")


def set_bias_map(network: Network, layer: LinearLayer, bias_map: Tensor) -> None:
    """Give a layer a bias [1, O, ...] that varies over space: an addition behind it, in place of its bias vector."""
    if layer.bias_map is not None:
        old = network.constants[str(layer.bias_map.target)]
        constant = network.add_constant(f"{layer.name}.bias_map", bias_map.to(old.dtype), before=layer.output)
        layer.output.update_arg(1, constant)
        return
    with network.graph.inserting_after(layer.node):
        add = network.graph.call_function(aten.add.Tensor)
    add.meta = {**layer.node.meta}
    layer.node.replace_all_uses_with(add)
    weight = network.constants[str(layer.weight.target)]
    constant = network.add_constant(f"{layer.name}.bias_map", bias_map.to(weight.dtype), before=layer.node)
    add.args = (layer.node, constant)
    _drop_bias(layer)


def _drop_bias(layer: LinearLayer) -> None:
    args = list(layer.node.args)
    if len(args) > 2:
        args[2] = None
    layer.node.args = tuple(args)
    layer.node.kwargs = {k: v for k, v in layer.node.kwargs.items() if k != "bias"}


def _update(
    network: Network, layer: LinearLayer, position: int, old: fx.Node | None, value: Tensor, name: str
) -> None:
    dtype = network.constants[str(layer.weight.target)].dtype
    base = name if old is None else str(old.target)
    if old is not None and _only_reader(network, old, layer.node):
        network.constants[base] = value.to(dtype)
        return
    constant = network.add_constant(base, value.to(dtype), before=layer.node)
    args = [*layer.node.args, *[None] * (position + 1 - len(layer.node.args))]
    args[position] = constant
    keyword = ("input", "weight", "bias")[position]
    layer.node.args = tuple(args)
    layer.node.kwargs = {k: v for k, v in layer.node.kwargs.items() if k != keyword}


def _only_reader(network: Network, constant: fx.Node, reader: fx.Node) -> bool:
    same = [n for n in network.graph.nodes if n.op == "get_attr" and n.target == constant.target]
    return len(same) == 1 and list(constant.users) == [reader]


def bias_of(network: Network, layer: LinearLayer) -> Tensor | None:
    """The layer's bias vector in float64."""
    return None if layer.bias is None else network.constants[str(layer.bias.target)].double()


def weight_of(network: Network, layer: LinearLayer) -> Tensor:
    """The layer's weight in float64."""
    return network.constants[str(layer.weight.target)].double()
