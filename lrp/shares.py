"""From a rule's branches to relevance: denominators, stabilizers, and what becomes of a bias's share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from fusion.linear import LinearLayer
from lrp.graft import balanced, ratio, relative_ratio
from lrp.rules import AbsLRP, Branch, LinearRule, Rule

if TYPE_CHECKING:
    from lrp.surrogate import Builder

aten = torch.ops.aten
# A branch, the sum of its terms without bias, and its part of the bias (None where the layer has none).
Part = tuple[Branch, fx.Node, fx.Node | None]
_SIDES = {"positive": aten.clamp_min.default, "negative": aten.clamp_max.default}


def quotient(
    builder: Builder, layer: LinearLayer, rule: Rule, numerator: fx.Node, denominator: fx.Node
) -> fx.Node:
    """numerator / stab(denominator), both of the layer's outputs, as the rule stabilizes it."""
    above, below = builder.detached(numerator), builder.detached(denominator)
    if not rule.relative:
        return builder.emit(ratio, above, below, rule.epsilon)
    return builder.emit(relative_ratio, above, below, rule.epsilon, builder.x, builder.place(layer.output))


def branched(
    builder: Builder,
    layer: LinearLayer,
    rule: LinearRule,
    value: fx.Node,
    parts: Sequence[Part],
    magnitudes: Callable[[], fx.Node],
) -> fx.Node:
    """The layer's value (detached) with the relevance of a rule of several terms. magnitudes: sum_i |a_i w_ik|."""
    node = layer.output
    if isinstance(rule, AbsLRP):
        ((_, carrier, _),) = parts
        return builder.emit(
            balanced, builder.recorder, builder.key(node), value, carrier, builder.x, builder.place(node)
        )
    carriers, factors, of_bias = [], [], []
    for branch, carrier, bias in parts:
        denominator = builder.detached(carrier)
        if rule.bias != "omit" and bias is not None:
            denominator = builder.emit(aten.add.Tensor, denominator, bias)
        numerator = value if branch.where == "all" else builder.once(_SIDES[branch.where], value, 0)
        factor = quotient(builder, layer, rule, numerator, denominator)
        if branch.coefficient != 1:
            factor = builder.emit(aten.mul.Tensor, factor, branch.coefficient)
        carriers.append(carrier)
        factors.append(factor)
        if rule.bias == "redistribute" and bias is not None:
            of_bias.append(builder.emit(aten.mul.Tensor, factor, bias))
    if of_bias:
        carrier, factor = redistributed(builder, of_bias, magnitudes())
        carriers.append(carrier)
        factors.append(factor)
    return builder.graft(node, value, carriers, factors)


def redistributed(
    builder: Builder, of_bias: Sequence[fx.Node], magnitudes: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """The carrier and the factor that hand the shares of biases to the inputs, by the magnitude of their parts."""
    total = of_bias[0]
    for part in of_bias[1:]:
        total = builder.emit(aten.add.Tensor, total, part)
    return magnitudes, builder.emit(ratio, total, builder.detached(magnitudes))
