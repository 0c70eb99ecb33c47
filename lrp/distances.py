"""Relevance of a layer of distances, z_k = sum_i v_ki |x_i - w_ki| + b_k (AdderNet): what each input adds to it.

The reference is x = 0: z_k = sum_i c_ki + b0_k with c_ki = v_ki (|x_i - w_ki| - |w_ki|) and b0_k = b_k +
sum_i v_ki |w_ki|. An input of zero adds nothing, and |c_ki| <= |v_ki x_i|. The rules for linear layers read c_ki where
they have a_i w_ik, and b0_k where they have b_k. The gradient is no explanation here: v_ki sign(x_i - w_ki) x_i is c_ki
only where x_i lies on zero's side of w_ki, and AdderNet's published backward pass is not even the derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fusion.distances import Distances
from fusion.linear import LinearLayer
from lrp.graft import ratio
from lrp.rules import MAGNITUDE, Branch, LinearRule, Weighting
from lrp.shares import branched

if TYPE_CHECKING:
    from lrp.surrogate import Builder

aten = torch.ops.aten


def contributions(patches: Tensor, centres: Tensor, weights: Tensor) -> Tensor:
    """c_ki = v_ki (|x_i - w_ki| - |w_ki|): patches [N, I, L], centres and weights [K, I] -> [N, K, I, L]."""
    w = centres[:, :, None]
    return weights[:, :, None] * ((patches[:, None] - w).abs() - w.abs())


def carrier(patches: Tensor, parts: Tensor) -> Tensor:
    """sum_i parts_ki as a linear function of x, whose weights are parts_ki / x_i: -> [N, K, L]."""
    x = patches[:, None]
    return (x * ratio(parts, x.detach())).sum(2)


def distance_layer(builder: Builder, layer: LinearLayer, rule: LinearRule, read: Distances) -> fx.Node:
    """The surrogate of a layer of distances under a rule for linear layers."""
    network, name = builder.network, layer.node.name
    v = network.constants[str(layer.weight.target)].flatten(1)
    weights = builder.constant(f"{name}.distance_weights", v)
    centres = builder.constant(f"{name}.distance_centres", read.centres)
    x = builder.values[read.patches]
    value = builder.detached(builder.copied(layer.node, lambda n: builder.detached(builder.values[n])))
    bias = (v * read.centres.abs()).sum(1).reshape(1, -1, 1)
    if layer.bias is not None:
        bias = bias + network.constants[str(layer.bias.target)].reshape(1, -1, 1)
    if layer.bias_map is not None:
        bias = bias + network.constants[str(layer.bias_map.target)]
        value = builder.emit(aten.add.Tensor, value, builder.values[layer.bias_map])
    parts = builder.emit(contributions, builder.detached(x), centres, weights)
    branches = []
    for branch in rule.branches():
        total = builder.emit(carrier, x, _weighed(builder, parts, branch))
        shift = builder.constant(f"{name}.distance_bias_{branch.bias.name}", branch.bias.apply(bias))
        branches.append((branch, total, shift))
    return branched(
        builder, layer, rule, value, branches, lambda: builder.emit(carrier, x, _applied(MAGNITUDE, parts))
    )


def _weighed(builder: Builder, parts: fx.Node, branch: Branch) -> fx.Node:
    """A branch's weighting of the contributions: they are its weights, and its inputs are ones."""
    (weighting,) = (weighting for part, weighting in branch.terms if part != "negative")
    return _applied(weighting, parts)


def _applied(weighting: Weighting, node: fx.Node) -> fx.Node:
    """A weighting, written into the graph."""
    proxy = weighting.apply(fx.Proxy(node))  # type: ignore[arg-type]
    assert isinstance(proxy, fx.Proxy)
    return proxy.node
