"""Forward: push S x + T along everything that reads it, until linear layers take it.

Every node that reads changed values gets a `Step`: how its own old output follows from its new one (old = S new + T),
or that it is as before because the node took the map, and the edits that this needs. Nothing is edited before every
path has ended in a layer that takes the map; where one does not, nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fusion.affine import RUNNING, AffineNode, Coefficients, affine_node, compact, then
from fusion.linear import linear_layer, linear_layer_ending_at
from fusion.network import Network, is_size_arithmetic, op_name
from fusion.normalize import argument
from fusion.passes.plan import (
    Obstacle,
    Plan,
    fits_in_front,
    fold_in_front,
    name_of,
    removal,
    replace_by_affine,
)
from fusion.registry import Registry

aten = torch.ops.aten

Known: TypeAlias = Mapping[fx.Node, "Coefficients | tuple[Coefficients, ...]"]


@dataclass(frozen=True)
class Step:
    """How a node passes the map on (None: it took it), the edits that this needs, and the layers that took it."""

    output: Coefficients | tuple[Coefficients, ...] | None
    edits: tuple[Callable[[], None], ...] = ()
    into: tuple[str | fx.Node, ...] = field(default=())


Handler = Callable[[Network, fx.Node, Known], Step]
# How operators pass a map on.
handler: Registry[Handler] = Registry()


def plan_forward(network: Network, start: AffineNode) -> Plan:
    """Move the map behind `start` into the layers after it. Raises Obstacle."""
    known: dict[fx.Node, Coefficients | tuple[Coefficients, ...]] = {start.node: compact(start.coefficients)}
    edits: list[Callable[[], None]] = []
    into: list[str | fx.Node] = []
    waiting = set(start.node.users)
    node = start.node
    while waiting:
        node = node.next
        if node not in waiting:
            continue
        waiting.remove(node)
        if is_size_arithmetic(node):
            continue
        if node.op == "output":
            raise Obstacle("the network's output shows it")
        step = _step(network, node, known)
        edits += step.edits
        into += step.into
        if step.output is not None:
            known[node] = compact(step.output) if isinstance(step.output, Coefficients) else step.output
            waiting |= set(node.users)

    if not into:
        raise Obstacle("nothing reads it")
    last = start.strip or removal(network, start.node, start.source)
    return Plan((*edits, last), tuple(dict.fromkeys(into)))


def _step(network: Network, node: fx.Node, known: Known) -> Step:
    layer = linear_layer(network, node)
    if layer is not None:
        if layer.source not in known or any(
            n in known for n in node.all_input_nodes if n is not layer.source
        ):
            raise Obstacle(f"it makes the weights of '{name_of(node)}'")
        coefficients = _one(known, layer.source)
        fits_in_front(network, node, coefficients)
        return Step(None, (lambda: fold_in_front(network, node, coefficients),), (layer.name,))
    own = affine_node(network, node)
    if own is not None and own.strip is None and linear_layer_ending_at(network, node) is None:
        both = then(_one(known, own.source), own.coefficients)
        if op_name(node) in RUNNING:
            if compact(both).vector(1) is None:
                raise Obstacle(f"it does not run along the channels that '{name_of(node)}' normalizes")
            both = compact(both)
            return Step(None, (lambda: replace_by_affine(network, node, both),), (node,))
        # A constant factor or summand is taken along.
        return Step(both, (removal(network, node, own.source),))
    function = handler.get(op_name(node))
    if function is None:
        raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) reads it, with which no constant map commutes")
    return function(network, node, known)


def _one(known: Known, node: Any) -> Coefficients:
    found = known[node]
    assert isinstance(found, Coefficients)
    return found


# --- operators that move values, or mix values of one channel linearly ----------------------------------
_MOVING = (
    "reshape flatten unflatten permute transpose t squeeze unsqueeze expand slice select narrow flip roll index_select "
    "pixel_shuffle pixel_unshuffle to _to_copy reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
    "split split_with_sizes chunk unbind upsample_nearest2d repeat im2col"
).split()


@handler(*_MOVING)
def _move(network: Network, node: fx.Node, known: Known) -> Step:
    """op(S x + T) = op(S) op(x) + op(T) where op only moves values."""
    source = node.args[0]
    coefficients = _one(known, source).full(source.meta["shape"])  # type: ignore[union-attr]
    scale, shift = (_run(network, node, t) for t in (coefficients.scale, coefficients.shift))
    if isinstance(scale, Tensor):
        return Step(Coefficients(_per_sample(scale), _per_sample(shift)))
    pairs = zip(scale, shift, strict=True)
    return Step(tuple(compact(Coefficients(_per_sample(s), _per_sample(t))) for s, t in pairs))


@handler("getitem")
def _item(network: Network, node: fx.Node, known: Known) -> Step:
    parts = known[node.args[0]]  # type: ignore[index]
    assert isinstance(parts, tuple)
    return Step(parts[node.args[1]])  # type: ignore[index]


_AVERAGING = (
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum "
    "upsample_bilinear2d upsample_bicubic2d"
).split()


@handler(*_AVERAGING)
def _average(network: Network, node: fx.Node, known: Known) -> Step:
    """op(S x + T) = S op(x) + op(T) where op is linear and mixes only values of one S."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    coefficients = _one(known, source)
    shape = source.meta["shape"]
    mixed = _mixed_axes(node, len(shape))
    if any(coefficients.scale.shape[axis] != 1 for axis in mixed):
        raise Obstacle(f"its scale varies over the values that '{name_of(node)}' ({op_name(node)}) averages")
    scale = coefficients.scale
    if op_name(node) in ("mean", "sum") and not argument(node, "keepdim"):
        for axis in sorted(mixed, reverse=True):
            scale = scale.squeeze(axis)
    if _averages_exactly(node) and all(coefficients.shift.shape[axis] == 1 for axis in mixed):
        # The average of equal values is that value; rounding must not make a map of it.
        shift = coefficients.shift
        if scale.ndim != shift.ndim:
            shift = shift.reshape([size for axis, size in enumerate(shift.shape) if axis not in mixed])
    else:
        shift = _per_sample(_run(network, node, coefficients.full(shape).shift))
    return Step(Coefficients(scale, shift))


def _averages_exactly(node: fx.Node) -> bool:
    """Whether equal values come out as they go in: no sum, no padding or other number in the divisor."""
    op = op_name(node)
    if op.startswith("avg_pool"):
        counted = argument(node, "count_include_pad", True) and any(argument(node, "padding", [0]) or [0])
        return not counted and argument(node, "divisor_override", None) is None
    return op != "sum"


def _mixed_axes(node: fx.Node, rank: int) -> list[int]:
    if op_name(node) in ("mean", "sum"):
        axes = argument(node, "dim")
        return [a % rank for a in axes] if axes else list(range(rank))
    pooled = 1 if op_name(node).endswith("1d") else 3 if op_name(node).endswith("3d") else 2
    return list(range(rank - pooled, rank))


@handler("constant_pad_nd")
def _pad(network: Network, node: fx.Node, known: Known) -> Step:
    """pad(S x + T, v) = S pad(x, 0) + pad(T, v), with S = 1 in the padding: pad(x, 0) is 0 there whatever S is."""
    value = float(argument(node, "value", 0))
    if value in (float("inf"), float("-inf")):
        raise Obstacle(f"'{name_of(node)}' pads with infinity")
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    coefficients = _one(known, source).full(source.meta["shape"])
    padded = aten.constant_pad_nd.default(coefficients.shift, node.args[1], value)
    narrow = _one(known, source).scale
    pads: list[int] = list(node.args[1])  # type: ignore[arg-type]
    for i in range(len(pads) // 2):
        axis = narrow.ndim - 1 - i
        if narrow.shape[axis] != 1 and (pads[2 * i] or pads[2 * i + 1]):
            widths = [0] * (2 * i) + pads[2 * i : 2 * i + 2]
            narrow = aten.constant_pad_nd.default(narrow, widths, 1.0)

    def edit() -> None:
        node.args = (node.args[0], node.args[1], 0)
        node.kwargs = {}

    return Step(Coefficients(narrow, padded), (edit,))


# --- operators that choose ------------------------------------------------------------------------------
@handler("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax")
def _max(network: Network, node: fx.Node, known: Known) -> Step:
    """max(S x + T) = |S| max(sign(S) x) + T, where S and T are the same for all that is compared."""
    if op_name(node).startswith("adaptive"):
        raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) also returns where the maxima are")
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    coefficients = _one(known, source)
    rank = len(source.meta["shape"])
    axes = [a % rank for a in argument(node, "dim")] if op_name(node) == "amax" else _mixed_axes(node, rank)
    if any(t.shape[axis] != 1 for axis in axes for t in (coefficients.scale, coefficients.shift)):
        raise Obstacle(f"it varies over the values that '{name_of(node)}' ({op_name(node)}) compares")
    edits: tuple[Callable[[], None], ...] = ()
    if bool((coefficients.scale < 0).any()):
        edits = (lambda: _flip_signs(network, node, coefficients.scale),)
    moved = coefficients
    if op_name(node) == "amax" and not argument(node, "keepdim"):
        for axis in sorted(axes, reverse=True):
            moved = moved.map(lambda t, a=axis: t.squeeze(a))  # type: ignore[misc]
    return Step(Coefficients(moved.scale.abs(), moved.shift), edits)


def _flip_signs(network: Network, node: fx.Node, scale: Tensor) -> None:
    """Let a node read sign(S) x."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    signs = torch.where(scale < 0, -1.0, 1.0).to(node.meta["dtype"])
    constant = network.add_constant(f"{name_of(node)}.signs", signs, before=node)
    with network.graph.inserting_before(node):
        flipped = network.graph.call_function(aten.mul.Tensor, (source, constant))
    flipped.meta = {**source.meta, "layer": node.meta.get("layer", "")}
    node.update_arg(0, flipped)


@handler("relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu", "prelu")
def _threshold(network: Network, node: fx.Node, known: Known) -> Step:
    """relu(S x + T) = S max(x, -T/S) + T for S > 0, S min(x, -T/S) + T for S < 0, and relu(T) for S = 0; likewise for
    two bounds; a leaky slope a gives S (a x + (1 - a) max(x, -T/S)) + T (the thresholded activation of Pahde et al.
    2023, arXiv:2211.17174, appendix)."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    coefficients = _one(known, source)
    op = op_name(node)
    bounds = _BOUNDS[op](node)
    if bounds is None:
        raise Obstacle(f"the bounds of '{name_of(node)}' ({op}) are no constants")
    low, high = bounds
    slope = _slope(network, node)
    scale, shift = coefficients.broadcast()
    zero = scale == 0
    if bool(zero.any()):
        # Where S = 0 the output is the constant f(T): S' = 0, T' = f(T), whatever the new node says.
        answer = _activation(shift, low, high, slope)
        shift_out = torch.where(zero, answer, shift)
    else:
        shift_out = shift

    def edit() -> None:
        _write_thresholds(network, node, coefficients, low, high, slope)

    return Step(Coefficients(scale, shift_out), (edit,))


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


def _activation(t: Tensor, low: float | None, high: float | None, slope: Tensor | None) -> Tensor:
    clamped = t.clamp(low, high)
    return clamped if slope is None else slope * t + (1 - slope) * clamped


def _write_thresholds(
    network: Network,
    node: fx.Node,
    coefficients: Coefficients,
    low: float | None,
    high: float | None,
    slope: Tensor | None,
) -> None:
    scale, shift = coefficients.broadcast()
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    dtype, layer = node.meta["dtype"], name_of(node)
    graph = network.graph

    def constant(name: str, t: Tensor) -> fx.Node:
        return network.add_constant(f"{layer}.{name}", t.to(dtype).contiguous(), before=node)

    def emit(target: Callable[..., Any], *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        new.meta = {**node.meta}
        return new

    value = source
    for name, bound, lower in (("threshold", low, True), ("ceiling", high, False)):
        if bound is None:
            continue
        at = constant(name, (bound - shift) / safe)
        # A lower bound of S x + T is an upper bound of x where S < 0.
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
    if slope is not None:
        leak = emit(aten.mul.Tensor, source, constant("slope", slope))
        value = emit(aten.add.Tensor, leak, emit(aten.mul.Tensor, value, constant("rest", 1 - slope)))
    node.replace_all_uses_with(value)
    graph.erase_node(node)


# --- operators with several inputs ----------------------------------------------------------------------
@handler("add", "sub")
def _sum(network: Network, node: fx.Node, known: Known) -> Step:
    """(S x + T) + (S y + U) = S (x + y) + (T + U); a sum with something unscaled passes shifts only."""
    if argument(node, "alpha", 1) != 1:
        raise Obstacle(f"'{name_of(node)}' adds a multiple")
    sign = -1 if op_name(node) == "sub" else 1
    a, b = node.args[:2]
    left, right = (_one(known, n) if n in known else None for n in (a, b))
    one = torch.ones([1] * len(node.meta["shape"]), dtype=torch.float64)
    scales = [one if c is None else c.scale for c in (left, right)]
    if not _same(scales[0], scales[1]):
        raise Obstacle(
            f"its scale does not pass the sum at '{name_of(node)}', which also adds something unscaled"
        )
    shift = 0 * one
    shift = shift + (left.shift if left is not None else 0)
    shift = shift + (sign * right.shift if right is not None else 0)
    return Step(Coefficients(scales[0], shift))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.ndim != b.ndim:
        return False
    return (
        bool((a == b).all())
        if all(x == y or 1 in (x, y) for x, y in zip(a.shape, b.shape, strict=True))
        else False
    )


@handler("mul", "div")
def _product(network: Network, node: fx.Node, known: Known) -> Step:
    """(S x) y = S (x y): a pure scale passes a product or a numerator."""
    a, b = node.args[:2]
    if op_name(node) == "div" and b in known:
        raise Obstacle(f"'{name_of(node)}' divides by it")
    scale = torch.ones([1] * len(node.meta["shape"]), dtype=torch.float64)
    for n in (a, b):
        if n in known:
            factor = _one(known, n)
            if bool(factor.shift.any()):
                raise Obstacle(f"its shift does not pass the product at '{name_of(node)}'")
            scale = scale * factor.scale
    return Step(Coefficients(scale, 0 * scale))


@handler("cat", "concat")
def _join(network: Network, node: fx.Node, known: Known) -> Step:
    """cat(S x + T, y) = cat(S, 1) cat(x, y) + cat(T, 0)."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    axis = int(argument(node, "dim", 0)) % len(node.meta["shape"])
    if axis == 0:
        raise Obstacle(f"'{name_of(node)}' joins along the batch")
    scales, shifts = [], []
    for part in parts:
        size = int(part.meta["shape"][axis] or 1)
        rank = len(part.meta["shape"])
        one = torch.ones([1] * rank, dtype=torch.float64)
        found = _one(known, part) if part in known else Coefficients(one, 0 * one)
        widths = [-1] * rank
        widths[axis] = size
        scales.append(found.scale.expand(widths))
        shifts.append(found.shift.expand(widths))
    return Step(Coefficients(_joined(scales, axis), _joined(shifts, axis)))


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    rank = parts[0].ndim
    sizes = [max(p.shape[i] for p in parts) for i in range(rank)]
    return torch.cat(
        [p.expand([p.shape[i] if i == axis else sizes[i] for i in range(rank)]) for p in parts], axis
    )


@handler("scaled_dot_product_attention")
def _attention(network: Network, node: fx.Node, known: Known) -> Step:
    """sum_j p_j (S v_j + T) = S (sum_j p_j v_j) + T, since sum_j p_j = 1, with S and T the same for all tokens."""
    value = node.args[2]
    if any(n in known for n in node.all_input_nodes if n is not value):
        raise Obstacle(f"'{name_of(node)}' compares tokens by it")
    coefficients = _one(known, value)
    if any(t.shape[-2] != 1 for t in (coefficients.scale, coefficients.shift)):
        raise Obstacle(f"it varies over the tokens that '{name_of(node)}' averages")
    return Step(coefficients)


# --- running an operator on coefficients ----------------------------------------------------------------
def _run(network: Network, node: fx.Node, value: Tensor) -> Any:
    """The node's own operator on coefficients in the place of its first argument, for a batch of one."""
    sizes: dict[fx.Node, Any] = {}

    def lookup(n: fx.Node) -> Any:
        if n is node.args[0]:
            return value
        if is_size_arithmetic(n):
            return _size(n, sizes)
        constant = network.constant(n)
        if constant is None:
            raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) also depends on something computed")
        return constant

    args = fx.node.map_arg(node.args, lookup)
    kwargs = {
        k: v for k, v in fx.node.map_arg(dict(node.kwargs), lookup).items() if k not in ("dtype", "device")
    }
    if op_name(node) in ("to", "_to_copy"):
        return value
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) mixes samples of a batch") from error


def _size(node: fx.Node, sizes: dict[fx.Node, Any]) -> Any:
    """A size computed for a batch of one."""
    if node not in sizes:
        if op_name(node) == "sym_size":
            shape = node.args[0].meta["shape"]  # type: ignore[union-attr]
            size = shape[node.args[1]]
            if size is None and node.args[1] != 0:
                raise Obstacle("a size other than the batch follows the batch")
            sizes[node] = 1 if size is None else size
        else:
            args = fx.node.map_arg(node.args, lambda n: _size(n, sizes))
            sizes[node] = node.target(*args)  # type: ignore[operator]
    return sizes[node]


def _per_sample(t: Tensor) -> Tensor:
    """Coefficients whose first axis is the batch again: where samples were spread over it, they must be alike."""
    if t.shape[0] != 1:
        if not bool((t == t[:1]).all()):
            raise Obstacle("it differs between the parts that a reshape spreads over the batch")
        t = t[:1]
    return t
