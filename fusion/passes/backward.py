"""Backward: let everything that feeds S v + T produce it itself, until linear layers have taken it.

The mirror image of `forward`: a node that only the affine map reads (or nodes on its way) is asked to answer S v + T in
place of v, and passes the demand on to what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, fx

from fusion.affine import RUNNING, AffineNode, Coefficients, affine_node, compact, reshaped, then
from fusion.linear import LinearLayer, linear_layer_ending_at
from fusion.network import Network, op_name, reads_values
from fusion.normalize import argument
from fusion.passes.plan import (
    Obstacle,
    Plan,
    fits_behind,
    fold_behind,
    fold_bias_behind,
    mixes_alike,
    name_of,
    removal,
    replace_by_affine,
)
from fusion.passes.thresholds import BENT, bends_of, write_bends
from fusion.recognize import owner
from fusion.registry import Registry

aten = torch.ops.aten

Demand: TypeAlias = tuple[fx.Node, Coefficients]
Edit: TypeAlias = Callable[[], None]
# (node, coefficients) -> the demands on what it reads, and its own edits
Handler: TypeAlias = Callable[[Network, fx.Node, Coefficients], tuple[list[Demand], list[Edit]]]
# How operators hand a demand on.
handler: Registry[Handler] = Registry()
# How activations hand it on, when their bends may move.
bender: Registry[Handler] = Registry()


def plan_backward(network: Network, start: AffineNode, *, bending: bool = False) -> Plan:
    """Move the map at `start` into the layers before it. Raises Obstacle.

    bending: activations on the way may get their bends at other places (see `plan_behind_activations`).
    """
    if start.strip is not None:
        raise Obstacle("it stands behind statistics of its input")
    taken_out = removal(network, start.node, start.source)
    if start.coefficients.is_identity:  # x + 0, x * 1
        return Plan((taken_out,), (), (owner(network, start),), frozenset({start.node}), (start.node,))
    edits: list[Edit] = []
    into: list[str | fx.Node] = []
    region = {start.node}
    todo: list[tuple[fx.Node, Coefficients, fx.Node]] = [
        (start.source, compact(start.coefficients), start.node)
    ]
    while todo:
        node, coefficients, asker = todo.pop()
        layer = linear_layer_ending_at(network, node)
        others = [user for user in node.users if user is not asker and reads_values(user)]
        if others:
            raise Obstacle(f"'{name_of(node)}' before it is also read by '{name_of(others[0])}'")
        if coefficients.is_identity:
            continue
        region.add(node)
        if layer is not None:
            region.add(layer.node)
            if coefficients.vector(-1) is None and mixes_alike(layer, coefficients.scale):
                edits.append(_passing(network, layer, coefficients))
                todo.append(
                    (layer.source, Coefficients(coefficients.scale, 0 * coefficients.scale), layer.node)
                )
                continue
            fits_behind(network, layer.node, coefficients)
            edits.append(_folding(network, layer, coefficients))
            into.append(layer.name)
            continue
        own = affine_node(network, node)
        if own is not None and own.strip is None:
            both = compact(then(own.coefficients, coefficients))
            if op_name(node) in RUNNING:
                if both.vector(1) is None:
                    raise Obstacle(f"it does not run along the channels that '{name_of(node)}' normalizes")
                edits.append(_merging(network, own, both))
                into.append(node)
            else:  # a constant factor or summand is taken along
                edits.append(removal(network, own.node, own.source))
                todo.append((own.source, both, node))
            continue
        function = handler.get(op_name(node)) if node.op == "call_function" else None
        if bending and node.op == "call_function":
            function = bender.get(op_name(node)) or function
        if function is None:
            what = (
                "the network's input" if node.op == "placeholder" else f"'{name_of(node)}' ({op_name(node)})"
            )
            raise Obstacle(f"it follows {what}")
        demands, own_edits = function(network, node, coefficients)
        edits += own_edits
        todo += [(source, compact(c), node) for source, c in demands]

    if not into:
        raise Obstacle("nothing writes it")
    # Edits change nodes in place, so the order does not matter.
    edits.append(taken_out)
    return Plan(
        tuple(edits), tuple(dict.fromkeys(into)), (owner(network, start),), frozenset(region), (start.node,)
    )


def plan_behind_activations(network: Network, start: AffineNode) -> Plan:
    """Backward too, but past piecewise linear activations, whose bends move: for maps that find no reader to take them
    (a residual sum behind them), since an activation that stays as it is explains more simply. Raises Obstacle."""
    return plan_backward(network, start, bending=True)


def _folding(network: Network, layer: LinearLayer, coefficients: Coefficients) -> Edit:
    return lambda: fold_behind(network, layer.node, coefficients)


def _passing(network: Network, layer: LinearLayer, coefficients: Coefficients) -> Edit:
    return lambda: fold_bias_behind(network, layer.node, coefficients)


def _merging(network: Network, own: AffineNode, both: Coefficients) -> Edit:
    return lambda: replace_by_affine(network, own.node, both)


@handler("add", "sub")
def _sum(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """S (a + b) + T = (S a + T) + S b, S (a - b) + T = (S a + T) - S b."""
    if argument(node, "alpha", 1) != 1 or node.args[0] is node.args[1]:
        raise Obstacle(f"'{name_of(node)}' adds a multiple")
    shape = node.meta["shape"]
    plain = Coefficients(c.scale, 0 * c.scale)
    demands: list[Demand] = []
    for n in node.args[:2]:
        if not isinstance(n, fx.Node) or network.constant(n) is not None or n.meta.get("shape") != shape:
            raise Obstacle(f"'{name_of(node)}' adds tensors of different shapes")
        demands.append((n, plain if demands else c))
    return demands, []


@handler("cat", "concat")
def _join(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """S cat(a, b) + T = cat(S_a a + T_a, S_b b + T_b)."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    axis = int(argument(node, "dim", 0)) % len(node.meta["shape"])
    if len(set(parts)) != len(parts) or axis == 0:
        raise Obstacle(f"'{name_of(node)}' joins the same tensor twice, or along the batch")
    demands: list[Demand] = []
    start = 0
    for part in parts:
        size = int(part.meta["shape"][axis])
        demands.append((part, c.map(lambda t, s=start, n=size: _slice(t, axis, s, n))))  # type: ignore[misc]
        start += size
    return demands, []


@handler("stack")
def _stack(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """S stack(a, b) + T = stack(S_a a + T_a, S_b b + T_b)."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    axis = int(argument(node, "dim", 0)) % len(node.meta["shape"])
    if len(set(parts)) != len(parts) or axis == 0:
        raise Obstacle(f"'{name_of(node)}' joins the same tensor twice, or along the batch")
    return [
        (part, c.map(lambda t, i=i: _slice(t, axis, i, 1).squeeze(axis)))  # type: ignore[misc]
        for i, part in enumerate(parts)
    ], []


def _slice(t: Tensor, axis: int, start: int, size: int) -> Tensor:
    return t if t.shape[axis] == 1 else t.narrow(axis, start, size)


@handler("relu", "leaky_relu", "prelu")
def _rectified(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """S relu(x) = relu(S x) for S > 0."""
    if bool(c.shift.any()) or not bool((c.scale > 0).all()):
        raise Obstacle(f"a shift or a sign does not pass '{name_of(node)}' ({op_name(node)}) backward")
    return [(node.args[0], c)], []  # type: ignore[list-item]


@bender(*BENT)
def _bent(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """S relu(x) + T = max(S x + T, T) for S >= 0 and min(S x + T, T) for S < 0: with every bound b at S b + T; a leaky
    slope a gives a u + (1 - a) max(u, T) of u = S x + T."""
    bends = bends_of(network, node)
    scale, shift = c.broadcast()

    def edit() -> None:
        # Where S = 0, u = T, and any bend at T leaves it.
        write_bends(
            network, node, bends, torch.where(scale < 0, -1.0, 1.0), lambda bound: scale * bound + shift
        )

    return [(node.args[0], c)], [edit]  # type: ignore[list-item]


@handler("max_pool1d", "max_pool2d", "max_pool3d")
def _max(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """S max(x) + T = max(S x + T) for S > 0, both the same for all that is compared."""
    if not bool((c.scale > 0).all()) or any(
        t.shape[a] != 1 for t in (c.scale, c.shift) for a in range(2, t.ndim)
    ):
        raise Obstacle(f"a sign, or a map that varies in space, does not pass '{name_of(node)}' backward")
    return [(node.args[0], c)], []  # type: ignore[list-item]


@handler(
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
)
def _average(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """S avg(x) + T = avg(S x + T), both the same for all that is averaged; counted padding would dilute T."""
    if any(t.shape[a] != 1 for t in (c.scale, c.shift) for a in range(2, t.ndim)):
        raise Obstacle(f"a map that varies in space does not pass '{name_of(node)}' backward")
    counted = argument(node, "count_include_pad", False) and any(argument(node, "padding", [0]) or [0])
    if bool(c.shift.any()) and (counted or argument(node, "divisor_override", None)):
        raise Obstacle(f"'{name_of(node)}' averages over its padding too")
    return [(node.args[0], c)], []  # type: ignore[list-item]


@handler("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """The same values in another shape."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    scale, shift = (reshaped(t, node.meta["shape"], source.meta["shape"]) for t in (c.scale, c.shift))
    if scale is None or shift is None:
        raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) moves samples")
    return [(source, Coefficients(scale, shift))], []


@handler("permute", "transpose")
def _permute(network: Network, node: fx.Node, c: Coefficients) -> tuple[list[Demand], list[Edit]]:
    """The same values with the axes in another order."""
    rank = len(node.meta["shape"])
    order = list(range(rank))
    if op_name(node) == "permute":
        order = [int(a) % rank for a in node.args[1]]  # type: ignore[union-attr,arg-type]
    else:
        i, j = (int(a) % rank for a in node.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = j, i
    if order[0] != 0:
        raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) moves the batch axis")
    inverse = [order.index(i) for i in range(rank)]
    return [(node.args[0], c.map(lambda t: t.permute(inverse)))], []  # type: ignore[list-item]
