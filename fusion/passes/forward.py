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

from fusion.affine import RUNNING, AffineNode, Coefficients, affine_node, compact, reshaped, then
from fusion.linear import LinearLayer, linear_layer, linear_layer_ending_at
from fusion.network import Network, is_size_arithmetic, op_name, reads_values
from fusion.normalize import argument
from fusion.passes.plan import (
    Obstacle,
    Plan,
    fits_in_front,
    fold_bias_in_front,
    fold_in_front,
    mixes_alike,
    name_of,
    removal,
    replace_by_affine,
)
from fusion.passes.thresholds import BENT, Bends, bends_of, bound_of, write_bends
from fusion.recognize import owner
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
    takers: list[fx.Node] = []
    waiting = set(start.node.users)
    node = start.node
    while waiting:
        node = node.next
        if node not in waiting:
            continue
        waiting.remove(node)
        if not reads_values(node):
            continue
        if node.op == "output":
            raise Obstacle("the network's output shows it")
        step = _step(network, node, known)
        edits += step.edits
        into += step.into
        if step.output is None:
            takers.append(node)
            continue
        output = compact(step.output) if isinstance(step.output, Coefficients) else step.output
        if isinstance(output, Coefficients) and output.is_identity:  # another part of what was joined
            continue
        known[node] = output
        waiting |= set(node.users)

    if not into:
        raise Obstacle("nothing reads it")
    last = start.strip or removal(network, start.node, start.source)
    # A layer that has a bias map, or gets one, answers behind it.
    layers = [linear_layer(network, node) for node in takers]
    ends = [node if layer is None else layer.output for node, layer in zip(takers, layers, strict=True)]
    region = frozenset((*known, *takers, *ends))
    # What has several results (lstm) is seen where they are read.
    ends = [end for node in ends for end in ([node] if node.meta["shape"] is not None else node.users)]
    return Plan((*edits, last), tuple(dict.fromkeys(into)), (owner(network, start),), region, tuple(ends))


def _step(network: Network, node: fx.Node, known: Known) -> Step:
    layer = linear_layer(network, node)
    if layer is not None:
        if layer.source not in known or any(
            n in known for n in node.all_input_nodes if n is not layer.source
        ):
            raise Obstacle(f"it makes the weights of '{name_of(node)}'")
        coefficients = _one(known, layer.source)
        if coefficients.vector(-1) is None and mixes_alike(layer, coefficients.scale):
            return _through(network, layer, coefficients)
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


def _through(network: Network, layer: LinearLayer, c: Coefficients) -> Step:
    """W (S x + T) + b = S (W x + b'): the layer takes the shift and passes the scale on, alone, since a product behind
    it would let nothing else pass."""
    if layer.bias_map is not None or bool((c.scale == 0).any()):
        raise Obstacle(f"'{layer.name}' mixes values along another axis, and its scale has zeros")
    passed = Coefficients(c.scale, 0 * c.scale)
    return Step(passed, (lambda: fold_bias_in_front(network, layer.node, c),), (layer.name,))


def _one(known: Known, node: Any) -> Coefficients:
    found = known[node]
    assert isinstance(found, Coefficients)
    return found


# --- operators that move values, or mix values of one channel linearly ----------------------------------
MOVING = (
    "reshape flatten unflatten permute transpose t squeeze unsqueeze expand slice select narrow flip roll index_select "
    "pixel_shuffle pixel_unshuffle to _to_copy reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
    "split split_with_sizes chunk unbind upsample_nearest2d repeat im2col"
).split()


@handler(*MOVING)
def _move(network: Network, node: fx.Node, known: Known) -> Step:
    """op(S x + T) = op(S) op(x) + op(T) where op only moves values."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    coefficients = _one(known, source).full(source.meta["shape"])
    scale, shift = (run_on(network, node, t) for t in (coefficients.scale, coefficients.shift))
    if isinstance(scale, Tensor):
        return Step(_per_sample(node, Coefficients(scale, shift)))
    return Step(tuple(Coefficients(s, t) for s, t in zip(scale, shift, strict=True)))


@handler("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(network: Network, node: fx.Node, known: Known) -> Step:
    """The same values in another shape, where samples may be spread over the first axis or gathered from it."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    found, before, after = _one(known, source), source.meta["shape"], node.meta["shape"]
    scale, shift = (reshaped(t, before, after) for t in (found.scale, found.shift))
    return _move(network, node, known) if scale is None or shift is None else Step(Coefficients(scale, shift))


@handler("getitem")
def _item(network: Network, node: fx.Node, known: Known) -> Step:
    parts = known[node.args[0]]  # type: ignore[index]
    assert isinstance(parts, tuple)
    index = int(node.args[1])  # type: ignore[arg-type]
    if index >= len(parts):
        raise Obstacle(f"'{name_of(node)}' takes one sample of the batch")
    return Step(_per_sample(node, parts[index]))


AVERAGING = (
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum "
    "upsample_bilinear2d upsample_bicubic2d"
).split()


@handler(*AVERAGING)
def _average(network: Network, node: fx.Node, known: Known) -> Step:
    """op(S x + T) = S op(x) + op(T) where op is linear and mixes only values of one S."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    coefficients = _one(known, source)
    shape = source.meta["shape"]
    mixed = mixed_axes(node, len(shape))
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
        shift = run_on(network, node, coefficients.full(shape).shift)
        shift = _per_sample(node, Coefficients(shift, shift)).shift
    return Step(Coefficients(scale, shift))


def _averages_exactly(node: fx.Node) -> bool:
    """Whether equal values come out as they go in: no sum, no padding or other number in the divisor."""
    op = op_name(node)
    if op.startswith("avg_pool"):
        counted = argument(node, "count_include_pad", True) and any(argument(node, "padding", [0]) or [0])
        return not counted and argument(node, "divisor_override", None) is None
    return op != "sum"


def mixed_axes(node: fx.Node, rank: int) -> list[int]:
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
    axes = [a % rank for a in argument(node, "dim")] if op_name(node) == "amax" else mixed_axes(node, rank)
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


@handler(*BENT)
def _threshold(network: Network, node: fx.Node, known: Known) -> Step:
    """relu(S x + T) = S max(x, -T/S) + T for S > 0, S min(x, -T/S) + T for S < 0, and relu(T) for S = 0; likewise for
    two bounds; a leaky slope a gives S (a x + (1 - a) max(x, -T/S)) + T (the thresholded activation of Pahde et al.
    2023, arXiv:2211.17174, appendix)."""
    return _bent(network, node, _one(known, node.args[0]), bends_of(network, node), 0)


@handler("maximum", "minimum")
def _bounded(network: Network, node: fx.Node, known: Known) -> Step:
    """max(S x + T, c) is an activation with a bend at the constant c; min likewise."""
    place = 0 if node.args[0] in known else 1
    return _bent(network, node, _one(known, node.args[place]), bound_of(network, node, place), place)


def _bent(network: Network, node: fx.Node, coefficients: Coefficients, bends: Bends, place: int) -> Step:
    """f(S x + T) = S f'(x) + T, where f' has the bends of f as x sees them; where S = 0 it is the constant f(T)."""
    scale, shift = coefficients.broadcast()
    zero = scale == 0
    # Where S = 0: S' = 0, T' = f(T), whatever the new node says.
    shift_out = torch.where(zero, bends(shift), shift) if bool(zero.any()) else shift

    def edit() -> None:
        safe = torch.where(zero, torch.ones_like(scale), scale)
        write_bends(network, node, bends, scale, lambda bound: (bound - shift) / safe, place)

    return Step(Coefficients(scale, shift_out), (edit,))


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


@handler("stack")
def _stack(network: Network, node: fx.Node, known: Known) -> Step:
    """stack(S x + T, y) = stack(S, 1) stack(x, y) + stack(T, 0)."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    rank = len(node.meta["shape"])
    axis = int(argument(node, "dim", 0)) % rank
    if axis == 0:
        raise Obstacle(f"'{name_of(node)}' joins along the batch")
    one = torch.ones([1] * (rank - 1), dtype=torch.float64)
    found = [_one(known, part) if part in known else Coefficients(one, 0 * one) for part in parts]
    scales, shifts = ([getattr(c, name).unsqueeze(axis) for c in found] for name in ("scale", "shift"))
    return Step(Coefficients(_joined(scales, axis), _joined(shifts, axis)))


@handler("lstm")
def _recurrent(network: Network, node: fx.Node, known: Known) -> Step:
    """W_ih (S x + T) + b_ih = (W_ih S) x + (W_ih T + b_ih) in the first layer, in each direction."""
    sequence, states, parameters, biased, _, _, _, both_ways, *_ = node.args
    coefficients = _one(known, sequence) if sequence in known else None
    vectors = None if coefficients is None else coefficients.vector(-1)
    if vectors is None or any(n in known for n in (*states, *parameters)):  # type: ignore[misc]
        raise Obstacle(f"it does not run along the axis that '{name_of(node)}' (lstm) reads")
    per_direction = 4 if biased else 2  # W_ih, W_hh, b_ih, b_hh
    starts = (0, per_direction) if both_ways else (0,)
    weights = [network.constant(parameters[i]) for i in starts]  # type: ignore[index]
    biases = [network.constant(parameters[i + 2]) for i in starts] if biased else []  # type: ignore[index]
    if any(t is None for t in (*weights, *biases)) or (not biased and bool(vectors[1].any())):
        raise Obstacle(f"'{name_of(node)}' (lstm) has no constant weights and biases to take it")

    def edit() -> None:
        new: list[fx.Node] = list(node.args[2])  # type: ignore[arg-type]
        for i in starts:
            weight = network.constants[str(new[i].target)]
            shifted = weight.double() @ vectors[1].expand(weight.shape[1])
            scaled = (weight.double() * vectors[0]).to(weight.dtype)
            new[i] = network.add_constant(str(new[i].target), scaled, before=node)
            if biased:
                bias = network.constants[str(new[i + 2].target)]
                total = (bias.double() + shifted).to(bias.dtype)
                new[i + 2] = network.add_constant(str(new[i + 2].target), total, before=node)
        node.update_arg(2, new)

    return Step(None, (edit,), (name_of(node),))


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
def run_on(network: Network, node: fx.Node, value: Tensor) -> Any:
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


def _per_sample(node: fx.Node, coefficients: Coefficients) -> Coefficients:
    """An operator's answer to coefficients as coefficients of its output: along the axis that follows the batch they
    must be alike, and along every other one there must be as many as there are values."""

    def fit(t: Tensor) -> Tensor:
        shape = node.meta["shape"]
        if t.ndim != len(shape) or any(
            n not in (1, size) for n, size in zip(t.shape, shape, strict=True) if size
        ):
            raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) mixes samples of a batch")
        for axis, size in enumerate(shape):
            if size is None and t.shape[axis] != 1:
                if not bool((t == t.narrow(axis, 0, 1)).all()):
                    raise Obstacle("it differs between the parts that a reshape spreads over the batch")
                t = t.narrow(axis, 0, 1)
        return t

    return coefficients.map(fit)
