"""Normalizations that a network spells out in primitives: one operator where ATen has it, a name where it has not.

A chain is recognized by what it computes, operand by operand: nothing is guessed from names, and a chain that differs
in one operand (another axis, eps added elsewhere) is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from fusion.affine import AffineNode, affine_node
from fusion.network import Network, is_size_arithmetic
from fusion.normalize import argument, is_call

aten = torch.ops.aten

# Operators that move or repeat values.
_MOVING = {
    "reshape",
    "flatten",
    "unflatten",
    "expand",
    "expand_as",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
}
_CASTING = {"to", "_to_copy"}


# --- reading chains ---------------------------------------------------------------------------------------------------
def _same(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two values are computed in the same way from the same nodes (networks repeat x - mean(x))."""
    if a is b:
        return True
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y, depth) for x, y in zip(a, b, strict=True))
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return type(a) is type(b) and bool(a == b)
    same_call = a.op == b.op == "call_function" and a.target is b.target and dict(a.kwargs) == dict(b.kwargs)
    random = (
        isinstance(a.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in a.target.tags
    )
    return same_call and not random and depth > 0 and _same(a.args, b.args, depth - 1)


def _number(network: Network, value: Any) -> float | None:
    """A number, or a constant of one value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    constant = network.constant(value)
    return float(constant) if constant is not None and constant.numel() == 1 else None


def _power(network: Network, node: Any, exponent: float) -> fx.Node | None:
    """x where the node is x ** exponent, for 2, 1/2 and -1/2, -1."""
    if (
        is_call(node, "pow")
        and _number(network, node.args[1]) == exponent
        and isinstance(node.args[0], fx.Node)
    ):
        return node.args[0]
    named = {2.0: ("square",), 0.5: ("sqrt",), -0.5: ("rsqrt",), -1.0: ("reciprocal",)}[exponent]
    if is_call(node, *named):
        return node.args[0]  # type: ignore[no-any-return]
    if exponent == 2 and is_call(node, "mul") and _same(node.args[0], node.args[1]):
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if exponent == -1 and is_call(node, "div") and _number(network, node.args[0]) == 1:
        return node.args[1] if isinstance(node.args[1], fx.Node) else None
    if exponent == -1 and is_call(node, "mul") and _number(network, node.args[1]) == 1:
        return _power(network, node.args[0], -1)  # 1.0 / x is traced as the reciprocal, times one
    if exponent == -0.5:
        below = _power(network, node, -1)
        return None if below is None else _power(network, below, 0.5)
    return None


def divided(network: Network, node: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """(A, D, inverse) where the node is A / D for two values computed from the input: `inverse` says that D stands in
    the graph as 1 / D or 1 / sqrt of it, given as D itself."""
    if is_call(node, "div") and argument(node, "rounding_mode") is None:
        a, d = node.args[:2]
        return (a, _unspread(d), False) if isinstance(a, fx.Node) and isinstance(d, fx.Node) else None
    if is_call(node, "mul"):
        for a, q in (node.args[:2], node.args[1::-1]):
            if isinstance(a, fx.Node) and isinstance(q, fx.Node) and is_inverse(network, q):
                return a, _unspread(q), True
    return None


def _unspread(node: fx.Node) -> fx.Node:
    """What is expanded along axes that it has, which broadcasting does as well."""
    while is_call(node, "expand", "expand_as") and len(node.args[0].meta["shape"]) == len(node.meta["shape"]):  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_inverse(network: Network, node: Any) -> bool:
    """Whether a factor is 1 / sqrt(x), 1 / x or a negative power of x: multiplying by it divides."""
    while is_call(node, *_MOVING, *_CASTING):
        node = node.args[0]
    if is_call(node, "pow"):
        exponent = _number(network, node.args[1])
        return exponent is not None and exponent < 0
    return is_call(node, "rsqrt", "reciprocal") or _power(network, node, -1) is not None


def _axes(node: fx.Node, name: str = "dim") -> tuple[int, ...] | None:
    """The axes of a reduction, counted from the first, None where all are meant."""
    axes, rank = argument(node, name), len(node.args[0].meta["shape"])  # type: ignore[union-attr]
    if axes is None or axes == []:
        return None
    return tuple(sorted(int(a) % rank for a in (axes if isinstance(axes, list | tuple) else [axes])))


def _mean(node: Any) -> tuple[fx.Node, tuple[int, ...]] | None:
    """(x, axes) where the node is the mean of x over them, which stay as axes of size one."""
    if not is_call(node, "mean") or node.target is not aten.mean.dim or not argument(node, "keepdim"):
        return None
    axes = _axes(node)
    return None if axes is None else (node.args[0], axes)


def _centred(node: Any) -> tuple[fx.Node, tuple[int, ...]] | None:
    """(x, axes) where the node is x - mean(x)."""
    if not is_call(node, "sub") or argument(node, "alpha", 1) != 1:
        return None
    mean = _mean(node.args[1])
    return mean if mean is not None and _same(mean[0], node.args[0]) else None


def _variance(network: Network, node: Any) -> tuple[fx.Node, tuple[int, ...]] | None:
    """(x, axes) where the node is the mean square of x - mean(x)."""
    if is_call(node, "var") and argument(node, "keepdim"):
        name, value = ("correction", 0) if node.target is aten.var.correction else ("unbiased", False)
        axes = _axes(node)
        return (node.args[0], axes) if argument(node, name, 1) == value and axes is not None else None
    square = _mean(node)
    middle = None if square is None else _power(network, square[0], 2)
    found = None if middle is None else _centred(middle)
    return found if found is not None and square is not None and found[1] == square[1] else None


def _plus_eps(network: Network, node: Any) -> tuple[Any, float]:
    """(x, eps) where the node is x + eps; eps = 0 where nothing is added."""
    if is_call(node, "add") and argument(node, "alpha", 1) == 1:
        for x, eps in (node.args[:2], node.args[1::-1]):
            value = _number(network, eps)
            if value is not None and isinstance(x, fx.Node):
                return x, value
    return node, 0.0


# --- chains that ATen has one operator for ----------------------------------------------------------------------------
def recognize(network: Network) -> bool:
    """Write layer_norm and rms_norm where the network spells them out, in place; whether anything was found.

    Needs the shapes that `annotate` writes, and leaves new nodes without.
    """
    found = False
    for node in list(network.graph.nodes):
        found |= _standardization(network, node)
    if found:
        network.graph.eliminate_dead_code()
    return found


def _standardization(network: Network, node: fx.Node) -> bool:
    """(x - mean x) / sqrt(var x + eps) and x / sqrt(mean x^2 + eps), over any axes but the batch's."""
    parts = divided(network, node)
    if parts is None:
        return False
    above, below, inverse = parts
    inside = _power(network, below, -0.5 if inverse else 0.5)
    if inside is None:
        return False
    statistic, eps = _plus_eps(network, inside)
    centred = _centred(above)
    variance = _variance(network, statistic)
    if (
        centred is not None
        and variance is not None
        and variance[1] == centred[1]
        and _same(variance[0], centred[0])
    ):
        return _write(network, node, aten.layer_norm.default, centred[0], centred[1], eps)
    if (
        centred is not None
        and variance is not None
        and variance[1] == centred[1]
        and _same(variance[0], above)
    ):
        # The variance of centred values is that of the values.
        return _write(network, node, aten.layer_norm.default, centred[0], centred[1], eps)
    square = _mean(statistic)
    base = None if square is None else _power(network, square[0], 2)
    if square is None or base is None or not _same(base, above):
        return False
    return _write(network, node, aten.rms_norm.default, above, square[1], eps)


def _write(
    network: Network,
    node: fx.Node,
    target: Callable[..., Any],
    source: fx.Node,
    axes: tuple[int, ...],
    eps: float,
) -> bool:
    """The operator over the last axes, on `source` with its axes moved there."""
    shape = source.meta["shape"]
    sizes = [shape[a] for a in axes]
    if any(size is None for size in sizes) or 0 in axes or node.meta["shape"] != shape:
        return False
    rank = len(shape)
    order = [a for a in range(rank) if a not in axes] + list(axes)
    moved = order != list(range(rank))

    def emit(function: Callable[..., Any], *args: Any) -> fx.Node:
        with network.graph.inserting_before(node):
            new = network.graph.call_function(function, args)
        new.meta = {**node.meta}
        return new

    x = emit(aten.permute.default, source, order) if moved else source
    weights = (None, None) if target is aten.layer_norm.default else (None,)
    value = emit(target, x, sizes, *weights, eps)
    if moved:
        value = emit(aten.permute.default, value, [order.index(a) for a in range(rank)])
    node.replace_all_uses_with(value)
    return True


# --- batch norms whose constants are spelled out ----------------------------------------------------------------------
def recognize_frozen(network: Network) -> None:
    """Write batch_norm for x (gamma rsqrt(var + eps)) + (beta - mean (gamma rsqrt(var + eps))), as frozen batch norms
    compute it; in place. Their constants must still be spelled out."""
    for node in list(network.graph.nodes):
        parts = _frozen(network, node)
        if parts is None:
            continue
        x, tensors, eps = parts
        gamma, beta, mean, var = tensors
        with network.graph.inserting_before(node):
            norm = network.graph.call_function(
                aten.batch_norm.default, (x, gamma, beta, mean, var, False, 0.0, eps, False)
            )
        norm.meta = {**node.meta}
        node.replace_all_uses_with(norm)
    network.graph.eliminate_dead_code()


def _frozen(network: Network, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], float] | None:
    if not is_call(node, "add") or argument(node, "alpha", 1) != 1 or not is_call(node.args[0], "mul"):
        return None
    x, scale = node.args[0].args[:2]  # type: ignore[union-attr]
    scale, shift = (_along_channels(network, n) for n in (scale, node.args[1]))
    if not (is_call(scale, "mul") and is_call(shift, "sub") and isinstance(x, fx.Node)):
        return None
    gamma, root = (_along_channels(network, n) for n in scale.args[:2])
    inside = _power(network, root, -0.5)
    if inside is None:
        return None
    var, eps = _plus_eps(network, inside)
    beta, product = (_along_channels(network, n) for n in shift.args[:2])
    if not is_call(product, "mul") or argument(shift, "alpha", 1) != 1:
        return None
    mean, again = (_along_channels(network, n) for n in product.args[:2])
    tensors = tuple(_along_channels(network, n) for n in (gamma, beta, mean, var))
    if again is not scale and not _same(again, scale):
        return None
    sizes = {None if (t := network.constant(n)) is None or t.ndim != 1 else len(t) for n in tensors}
    return (x, tensors, eps) if len(sizes) == 1 and None not in sizes else None


def _along_channels(network: Network, node: Any) -> Any:
    """What a reshape to [1, C, 1, 1] reads."""
    if is_call(node, "reshape"):
        size = list(node.args[1])
        if len(size) >= 2 and size[0] == 1 and all(s == 1 for s in size[2:]):
            return node.args[0]
    return node


# --- chains that ATen has no operator for: what they are called -------------------------------------------------------
_ELEMENTWISE = {
    "add", "sub", "rsub", "mul", "div", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "clamp_min",
    "clamp", "sigmoid", "log", "exp", "constant_pad_nd", "pad", *_MOVING, *_CASTING,
}  # fmt: skip
_POOLING = {"avg_pool1d", "avg_pool2d", "avg_pool3d"}
_REDUCING = {"mean", "sum", "var", "std", "linalg_vector_norm", "norm", *_POOLING}
_ROOTS = {"sqrt", "rsqrt", "std", "linalg_vector_norm", "norm"}


def normalizations(network: Network) -> dict[fx.Node, str]:
    """The chains that normalize by statistics of their input and are no operator of ATen: their last nodes, and names
    for reports. One that only serves another one (AdaNorm's gate) is part of that."""
    found: dict[fx.Node, str] = {}
    inner: set[fx.Node] = set()
    for node in network.graph.nodes:
        chain = _chain_ending_at(network, node)
        if chain is not None:
            found[node], region = chain
            inner |= region - {node}
    return {node: name for node, name in found.items() if node not in inner}


def _chain_ending_at(network: Network, node: fx.Node) -> tuple[str, set[fx.Node]] | None:
    """(name, nodes) of the normalization whose last node this is."""
    return _divisive(network, node) or _mixture(network, node)


def _computed(node: Any) -> bool:
    """Whether a value comes from the network's input (constants are folded by now)."""
    return isinstance(node, fx.Node) and node.op != "get_attr" and not is_size_arithmetic(node)


def _region(
    node: fx.Node, allowed: set[str], stop: Collection[fx.Node] = ()
) -> tuple[set[fx.Node], set[fx.Node]]:
    """(nodes of the expression that ends here, what it reads from outside): it goes on while operators are among
    `allowed`."""
    inside: set[fx.Node] = set()
    leaves: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in inside or current in leaves or not _computed(current):
            continue
        if current in stop or not is_call(current, *allowed):
            leaves.add(current)
            continue
        inside.add(current)
        # What is moved, or repeated in the shape of another tensor, does not depend on that tensor's values.
        todo += current.args[:1] if is_call(current, *_MOVING) else current.all_input_nodes  # type: ignore[arg-type]
    return inside, leaves


def _statistic(network: Network, node: fx.Node) -> tuple[set[fx.Node], fx.Node] | None:
    """(nodes, signal) where the node is the root (or another power) of means over one signal."""
    outside, reductions = _region(node, _ELEMENTWISE)
    if not reductions or not all(is_call(n, *_REDUCING) for n in reductions):
        return None
    signals = {_measured(network, n) for n in reductions}
    if len(signals) != 1:
        return None
    (signal,) = signals
    inside, leaves = _region(node, _ELEMENTWISE | _REDUCING, signals)
    powers = (n for n in outside if is_call(n, "pow"))
    rooted = any(is_call(n, *_ROOTS) for n in outside | reductions) or any(
        _number(network, n.args[1]) not in (1.0, 2.0, None) for n in powers
    )
    return (inside, signal) if leaves == signals and rooted else None


def _measured(network: Network, reduction: fx.Node) -> fx.Node:
    """The signal of a reduction: what it reads, freed of powers, movement and centering."""
    source: fx.Node = reduction.args[0]  # type: ignore[assignment]
    while True:
        squared, centred = _power(network, source, 2), _centred(source)
        if squared is not None:
            source = squared
        elif is_call(source, "pow") and _number(network, source.args[1]) is not None:
            source = source.args[0]  # type: ignore[assignment]
        elif centred is not None:
            source = centred[0]
        elif is_call(source, "abs", "constant_pad_nd", "pad", *_MOVING, *_CASTING):
            source = source.args[0]  # type: ignore[assignment]
        else:
            return source


def _divisive(network: Network, node: fx.Node) -> tuple[str, set[fx.Node]] | None:
    """A signal divided by the root of a mean over the same signal."""
    parts = divided(network, node)
    if parts is None or not (_computed(parts[0]) and _computed(parts[1])):
        return None
    above, below, _ = parts
    statistic = _statistic(network, below)
    if statistic is None:
        return None
    measured, signal = statistic
    numerator, leaves = _region(above, _ELEMENTWISE | {"mean", "std", "var"}, {signal})
    if leaves != {signal}:
        return None
    region = measured | numerator | {node}
    if self_gate(network, above) is not None:
        return "ada_norm", region
    if any(is_call(n, *_POOLING) for n in measured):
        return "local_response_norm", region
    if any(is_call(n, "linalg_vector_norm", "norm") for n in measured):
        return "l2_norm", region
    if any(is_call(n, "var", "std") or _variance(network, n) for n in measured):
        return ("standardization" if _centred(above) else "variance_norm"), region
    return "divisive_norm", region


def self_gate(network: Network, node: Any) -> fx.Node | None:
    """The factor G where the node is x - x G and G is x (or x less its mean) divided by a statistic, times constants:
    AdaNorm's gate 1 - k y, constant in training (Xu et al. 2019, arXiv:1911.07013)."""
    if not is_call(node, "sub") or argument(node, "alpha", 1) != 1 or not is_call(node.args[1], "mul"):
        return None
    x, product = node.args[:2]
    for own, gate in (product.args[:2], product.args[1::-1]):
        if own is not x or not isinstance(gate, fx.Node):
            continue
        inner = _free_of_constants(network, gate)
        parts = divided(network, inner)
        if parts is None:
            continue
        above = _free_of_constants(network, parts[0])
        centred = _centred(above)
        if above is x or (centred is not None and centred[0] is x):
            return gate
    return None


def _free_of_constants(network: Network, node: fx.Node) -> fx.Node:
    """What stands in front of constant factors."""
    while True:
        own = affine_node(network, node)
        if own is None or own.strip is not None or bool(own.coefficients.shift.any()):
            return node
        node = own.source


def _mixture(network: Network, node: fx.Node) -> tuple[str, set[fx.Node]] | None:
    """sum_k p_k(x) (S_k x + T_k) with p a softmax over k of something computed from x alone, element by element and by
    sums over one axis."""
    if not is_call(node, "sum") or not is_call(node.args[0], "mul"):
        return None
    product: fx.Node = node.args[0]  # type: ignore[assignment]
    for belongs, pieces in (product.args[:2], product.args[1::-1]):
        if not (_computed(belongs) and _computed(pieces)):
            continue
        between, ends = _region(belongs, {"mul", "div", *_MOVING})  # type: ignore[arg-type]
        maps, signals = _region(pieces, {"add", "sub", "mul", "div", *_MOVING})  # type: ignore[arg-type]
        if len(ends) != 1 or len(signals) != 1 or not is_call(next(iter(ends)), "softmax", "_softmax"):
            continue
        (softmax,) = ends
        if _axes(node) != (int(softmax.args[1]) % len(softmax.meta["shape"]),):  # type: ignore[arg-type]
            continue
        if any(sum(map(_computed, n.args[:2])) > 1 for n in maps | between if not is_call(n, *_MOVING)):
            continue
        inside, leaves = _region(softmax.args[0], _ELEMENTWISE | {"sum"}, signals)  # type: ignore[arg-type]
        if leaves == signals:
            return "mixture_norm", {node, product, softmax} | between | maps | inside
    return None


# --- whose constants these are ----------------------------------------------------------------------------------------
_STATISTICS = {"layer_norm", "group_norm", "instance_norm", "rms_norm"}


def owner(network: Network, start: AffineNode) -> fx.Node:
    """The normalization that a constant map belongs to: the node itself, or where constants stand right behind
    statistics of the input, as their scale and shift, the node that these end in."""
    if start.strip is not None or not is_call(start.node, "mul", "div", "add", "sub", "rsub"):
        return start.node
    node = start.source
    while True:
        if is_call(node, *_STATISTICS) or _chain_ending_at(network, node) is not None:
            return node
        own = affine_node(network, node)
        if own is not None and own.strip is None and is_call(node, "mul", "div", "add", "sub", "rsub"):
            node = own.source
        elif is_call(node, *_MOVING):
            node = node.args[0]  # type: ignore[assignment]
        else:
            return start.node
