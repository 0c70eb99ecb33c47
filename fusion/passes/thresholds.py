"""Piecewise linear activations behind, or in front of, an affine map: the same bends at other places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fusion.network import Network, op_name
from fusion.normalize import argument
from fusion.passes.plan import Obstacle, name_of

aten = torch.ops.aten

BENT = ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu", "prelu")
# One number, a constant in the rank of what it bounds, or no bound at all.
Bound: TypeAlias = float | Tensor | None


@dataclass(frozen=True)
class Bends:
    """f(x) = a x + (1 - a) clamp(x, low, high); a (None: 0) in the rank of x."""

    low: Bound
    high: Bound
    slope: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        clamped = x if self.low is None else x.clamp(min=self.low)
        clamped = clamped if self.high is None else clamped.clamp(max=self.high)
        return clamped if self.slope is None else self.slope * x + (1 - self.slope) * clamped


def bends_of(network: Network, node: fx.Node) -> Bends:
    """The bends of an activation among BENT. Raises Obstacle where they are computed."""
    bounds = _BOUNDS[op_name(node)](node)
    if bounds is None:
        raise Obstacle(f"the bounds of '{name_of(node)}' ({op_name(node)}) are no constants")
    return Bends(*bounds, _slope(network, node))


def bound_of(network: Network, node: fx.Node, place: int) -> Bends:
    """The bend of a maximum or minimum of its argument at `place` and a constant. Raises Obstacle."""
    value = network.constant(node.args[1 - place])
    rank = len(node.meta["shape"])
    if value is None or node.args[place].meta["shape"] != node.meta["shape"]:  # type: ignore[union-attr]
        raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) compares it with something computed")
    bound = value.double().reshape([1] * (rank - value.ndim) + list(value.shape))
    if bound.shape[0] != 1:
        raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) has a bound of its own for every sample")
    return Bends(bound, None, None) if op_name(node) == "maximum" else Bends(None, bound, None)


def write_bends(
    network: Network,
    node: fx.Node,
    bends: Bends,
    scale: Tensor,
    moved: Callable[[float | Tensor], Tensor],
    place: int = 0,
) -> None:
    """Replace an activation of its argument at `place` by one with its bends at `moved(bound)`, for each of its bounds.
    Lower bounds are upper ones where `scale` is negative. Both have a size of 1 or the tensor's along every axis."""
    dtype, layer = node.meta["dtype"], name_of(node)
    source: fx.Node = node.args[place]  # type: ignore[assignment]
    graph = network.graph

    def constant(name: str, t: Tensor) -> fx.Node:
        return network.add_constant(f"{layer}.{name}", t.to(dtype).contiguous(), before=node)

    def emit(target: Callable[..., Any], *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        new.meta = {**node.meta}
        return new

    value = source
    for name, bound, lower in (("threshold", bends.low, True), ("ceiling", bends.high, False)):
        if bound is None:
            continue
        at = constant(name, moved(bound))
        # A lower bound is an upper bound of x where S < 0.
        up, down = (emit(t, value, at) if needed else None for t, needed in (
            (aten.maximum.default, bool(((scale > 0) if lower else (scale < 0)).any())),
            (aten.minimum.default, bool(((scale < 0) if lower else (scale > 0)).any())),
        ))  # fmt: skip
        if up is not None and down is not None:
            mask = network.add_constant(
                f"{layer}.{name}_side", (scale > 0) if lower else (scale <= 0), before=node
            )
            value = emit(aten.where.self, mask, up, down)
        else:
            value = up or down or value
    if bends.slope is not None:
        leak = emit(aten.mul.Tensor, source, constant("slope", bends.slope))
        value = emit(aten.add.Tensor, leak, emit(aten.mul.Tensor, value, constant("rest", 1 - bends.slope)))
    node.replace_all_uses_with(value)
    graph.erase_node(node)


_BOUNDS: dict[str, Callable[[fx.Node], tuple[float | None, float | None] | None]] = {
    "relu": lambda n: (0.0, None),
    "relu6": lambda n: (0.0, 6.0),
    "leaky_relu": lambda n: (0.0, None),
    "prelu": lambda n: (0.0, None),
    "hardtanh": lambda n: (float(argument(n, "min_val")), float(argument(n, "max_val"))),
    "clamp": lambda n: _numbers(argument(n, "min"), argument(n, "max")),
    "clamp_min": lambda n: _numbers(argument(n, "min"), None),
}


def _numbers(low: Any, high: Any) -> tuple[float | None, float | None] | None:
    if any(v is not None and not isinstance(v, int | float) for v in (low, high)):
        return None
    return (None if low is None else float(low)), (None if high is None else float(high))


def _slope(network: Network, node: fx.Node) -> Tensor | None:
    if op_name(node) == "leaky_relu":
        return torch.tensor(float(argument(node, "negative_slope")), dtype=torch.float64)
    if op_name(node) == "prelu":
        weight = network.constant(node.args[1])
        if weight is None:
            raise Obstacle(f"the slopes of '{name_of(node)}' are no constants")
        rank = len(node.meta["shape"])
        return weight.double().reshape([1, -1, *[1] * (rank - 2)] if weight.numel() > 1 else [1] * rank)
    return None
