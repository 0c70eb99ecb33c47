"""Choices near a tie: relevance that fades from the winner to who is as good as it, where a jump would follow rounding.

The derivative of a maximum jumps where two values are equal, and relevance with it: by all of what the value carries. A
rounding error that turns the winner moves that much to another place. So, where a composite has a `tie_width`, what is
within that share of the values' root mean square of winning counts as tied, and the derivative goes over continuously.
The values stay what they are; what a smooth choice hands on less than it received stands in the ledger at its node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fusion.network import op_name
from fusion.normalize import argument
from lrp.graft import Place, ratio, spread
from lrp.surrogate import operator_rule

if TYPE_CHECKING:
    from lrp.surrogate import Builder

_SIDE = {"maximum": 1.0, "minimum": -1.0, "amax": 1.0, "amin": -1.0}


def lead(x: Tensor, bound: Tensor, side: float, width: float, samples: Tensor, place: Place) -> Tensor:
    """The multiplier of x in max(x, b) (side 1) or min(x, b) (side -1): 0 where b wins, 1 where x wins by the width or
    more, and linear between. The constant b keeps the rest, so that R_x = x m R / max(x, b) has no jump at x = b."""
    gap = side * (x - bound)
    return (gap / _width(width, x, samples, place)).clamp(0, 1)


def shared(
    x: Tensor, axes: Sequence[int], side: float, width: float, samples: Tensor, place: Place
) -> Tensor:
    """What carries the relevance of y = max_i x_i (side 1) or min_i x_i (side -1) over axes, which are kept: sum_i w_i
    x_i with constant w = softmax(side (x - y) / width), the derivative of the smooth maximum d log sum_i e^(x_i / d),
    d being the width. It hands on (sum_i w_i x_i) / y, no more than d log(n) / |y| off the whole, and divides by no
    value that may be 0. Infinite values, which masks and paddings are, have no weight."""
    fixed, finite = x.detach(), x.isfinite()
    known = torch.where(finite, fixed, 0)
    best = torch.where(finite, side * fixed, -torch.inf).amax(tuple(axes), keepdim=True)
    behind = side * known - torch.where(best.isfinite(), best, 0)
    weights = (behind / _width(width, known, samples, place)).exp() * finite
    weights = ratio(weights, weights.sum(tuple(axes), keepdim=True))
    return (weights * torch.where(finite, x, 0)).sum(tuple(axes), keepdim=True)


def _width(share: float, x: Tensor, samples: Tensor, place: Place) -> Tensor:
    """The share of the values' root mean square, above 0: where all values are 0 all are tied."""
    return (share * spread(x, samples, place)).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)


def threshold(builder: Builder, node: fx.Node) -> fx.Node | None:
    """The surrogate of a signal's maximum or minimum with a constant, None where it is none or where the winner takes
    all. Fusion leaves such thresholds where a norm went through a ReLU."""
    if not builder.composite.tie_width:
        return None
    signals = [n for n in node.args[:2] if builder.depends(n)]
    bounds = [n for n in node.args[:2] if isinstance(n, fx.Node) and n not in signals]
    if len(signals) != 1 or len(bounds) != 1 or signals[0].meta["shape"] != node.meta["shape"]:  # type: ignore[union-attr]
        return None
    x, bound = builder.values[signals[0]], builder.values[bounds[0]]  # type: ignore[index]
    value = builder.copied(node, lambda n: builder.detached(builder.values[n]) if n in signals else bound)
    factor = builder.emit(
        lead, builder.detached(x), bound, _SIDE[op_name(node)], builder.composite.tie_width, builder.x,
        builder.place(node),
    )  # fmt: skip
    return builder.graft(node, value, [x], [factor])


@operator_rule("amax", "amin")
def _best_of(builder: Builder, node: fx.Node) -> fx.Node:
    """Winner takes all, the gradient; with a tie width what is as good has its share."""
    if not builder.composite.tie_width:
        return builder.copied(node)
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    x, rank = builder.values[source], len(source.meta["shape"])
    axes = [axis % rank for axis in argument(node, "dim") or range(rank)]
    carrier = builder.emit(
        shared, x, axes, _SIDE[op_name(node)], builder.composite.tie_width, builder.x, builder.place(source)
    )
    if not argument(node, "keepdim"):
        carrier = builder.emit(torch.squeeze, carrier, tuple(axes))
    value = builder.copied(
        node, lambda n: builder.detached(builder.values[n]) if n is source else builder.values[n]
    )
    return builder.graft(node, value, [carrier], [None])
