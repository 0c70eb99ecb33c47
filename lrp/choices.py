"""Operators that choose, fill or measure: where relevance goes when values are picked, replaced or summed up in one.

The gradient of a choice is its rule (the winner takes all), and so is the gradient of a norm, which is homogeneous of
degree one. What is filled in from outside the image keeps the relevance that it receives, and so does a number that is
computed from the image without being a contribution to it: the inverse of a value, how often it fits, an index.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from lrp.graft import passed, received
from lrp.held import NORMS
from lrp.surrogate import operator_rule

if TYPE_CHECKING:
    from lrp.surrogate import Builder

aten = torch.ops.aten


@operator_rule("max", "min", "topk", "std", *NORMS, "broadcast_to", "tensor_split", "col2im")
def _gradient(builder: Builder, node: fx.Node) -> fx.Node:
    """Winner takes all, and |x|_p = sum_i x_i d|x|_p / dx_i (Euler)."""
    return builder.copied(node)


@operator_rule("expand_as", "type_as")
def _like(builder: Builder, node: fx.Node) -> fx.Node:
    """The second tensor gives its shape or its type, no values."""
    source, pattern = node.args[:2]  # by place: they may be the same tensor
    return builder.emit(node.target, builder.values[source], _numbers(builder, pattern))  # type: ignore[index,arg-type]


@operator_rule("masked_fill")
def _filled(builder: Builder, node: fx.Node) -> fx.Node:
    """What is filled in is a bias of its place; masked values hand on nothing."""
    source, mask, filled = node.args[:3]
    if isinstance(filled, int | float) and not math.isfinite(filled):
        # It wins no maximum and gets no attention; infinity times no relevance would be no number.
        return builder.copied(node)
    x, where = builder.values[source], _numbers(builder, mask)  # type: ignore[index]
    value = builder.emit(node.target, builder.detached(x), where, _numbers(builder, filled))  # type: ignore[arg-type]
    carrier = builder.emit(aten.masked_fill.Scalar, x, where, 0)
    return builder.graft(node, value, [carrier], [None])


@operator_rule("reciprocal", "rsqrt", "floor", "ceil", "trunc", "sign", "one_hot")
def stop(builder: Builder, node: fx.Node) -> fx.Node:
    """A statistic or a code, no contribution: it keeps what it receives."""
    value = builder.copied(node, lambda n: _numbers(builder, n))
    return builder.sink(node, value)


@operator_rule("logsumexp")
def _log_sum_exp(builder: Builder, node: fx.Node) -> fx.Node:
    """log sum_i e^x_i = sum_i s_i x_i + H(s), s the softmax and H its entropy: R_i = s_i x_i / y R, the gradient; the
    entropy keeps its part."""
    place = builder.place(node)
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    x = builder.emit(
        passed, builder.recorder, builder.key(node), builder.values[source], builder.place(source)
    )
    value = builder.copied(node, lambda n: x if n is source else builder.values[n])
    return builder.emit(received, builder.recorder, builder.key(node), value, place)


@operator_rule("var")
def _variance(builder: Builder, node: fx.Node) -> fx.Node:
    """The mean square of x less its mean is homogeneous of degree two: half its gradient."""
    value = builder.copied(node)
    half = builder.emit(torch.full_like, builder.detached(value), 0.5)
    return builder.graft(node, value, [value], [half], degree=2)


def _numbers(builder: Builder, value: Any) -> Any:
    """A value as a number that no gradient enters."""
    return builder.detached(builder.values[value]) if isinstance(value, fx.Node) else value
