"""Activations that a network writes out in primitives, recognized by what they compute.

Rules hang on activations; decomposed programs, older exporters and hand-written modules spell them out. Whatever ends a
chain of elementwise operators over one value and numbers is computed at a few points and compared with the activations
that there are, so that the order of its operators, and where its factors stand, does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fusion.network import Network, op_name
from fusion.normalize import is_call, put

aten = torch.ops.aten

_MOST_NODES = 12  # GELU by tanh has nine
_MOST_NUMBERS = 6
_POINTS = torch.cat(
    [torch.linspace(-9, 9, 37, dtype=torch.float64), torch.tensor([-30.0, -3.0, 0.1234, 3.0, 25.0]).double()]
)
# Where bounds may lie that the points do not reach; chains that are written with exponentials overflow there.
_FAR = torch.logspace(1, 6, 31, dtype=torch.float64)


@dataclass(frozen=True)
class Activation:
    """An operator, and how many numbers of the chain are arguments of its own."""

    target: Callable[..., Tensor]
    numbers: int = 0
    signed: bool = False  # whether these may be negative
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def options(self, numbers: list[float]) -> Iterator[tuple[float, ...]]:
        allowed = [n for n in numbers if self.signed or n > 0]
        return itertools.permutations(allowed, self.numbers)


# The first that fits is taken.
_ACTIVATIONS = (
    Activation(aten.gelu.default),
    Activation(aten.gelu.default, kwargs={"approximate": "tanh"}),
    Activation(aten.silu.default),
    Activation(aten.hardswish.default),
    Activation(aten.hardsigmoid.default),
    Activation(aten.mish.default),
    Activation(aten.softplus.default),
    Activation(aten.celu.default),
    Activation(aten.softplus.default, 1),
    Activation(aten.celu.default, 1),
    Activation(aten.softshrink.default, 1),
    Activation(aten.hardshrink.default, 1),
    Activation(aten.threshold.default, 2, signed=True),
)
_PRIMITIVES = {
    "abs", "add", "clamp", "clamp_max", "clamp_min", "div", "erf", "exp", "expm1", "ge", "gt", "hardsigmoid",
    "hardtanh", "le", "log", "log1p", "lt", "maximum", "minimum", "mul", "neg", "pow", "reciprocal", "relu", "relu6",
    "rsub", "sigmoid", "sign", "softplus", "sqrt", "square", "sub", "tanh", "where",
}  # fmt: skip
# Without one of these a chain is a polynomial or a quotient of two, and no activation.
_BENDING = {
    "abs", "clamp", "clamp_max", "clamp_min", "erf", "exp", "expm1", "hardsigmoid", "hardtanh", "maximum", "minimum",
    "relu", "relu6", "sigmoid", "softplus", "tanh", "where",
}  # fmt: skip
_LAST = {"add", "clamp", "div", "log", "log1p", "mul", "where"}


def recognize_activations(network: Network) -> None:
    """Write one operator for every chain that computes an activation, in place. Needs shapes, and gives new nodes
    theirs."""
    for node in list(network.graph.nodes):
        if is_call(node, *_LAST) and node.users and _is_floating(node) and not _slopes(network, node):
            _chain(network, node)


def _chain(network: Network, last: fx.Node) -> None:
    nodes = _behind(last)
    if len(nodes) < 2 or not any(op_name(node) in _BENDING for node in nodes):
        return
    for root in _roots(network, nodes):
        if root.meta.get("shape") != last.meta["shape"] or root.meta.get("dtype") != last.meta["dtype"]:
            continue
        reading = _Reading(network, nodes, {root: _POINTS})
        values = reading.value(last)
        if not isinstance(values, Tensor) or values.shape != _POINTS.shape:
            continue
        match = _match(values, sorted(reading.numbers)[:_MOST_NUMBERS])
        if match is not None and _holds(network, last, nodes, root, reading.numbers, *match):
            activation, arguments = match
            put(network, last, activation.target, root, *arguments, **activation.kwargs)
            return


def _holds(
    network: Network,
    last: fx.Node,
    nodes: list[fx.Node],
    root: fx.Node,
    numbers: set[float],
    activation: Activation,
    arguments: tuple[float, ...],
) -> bool:
    """Whether a chain is the activation far out too, and on both sides of its own numbers, of their products and
    quotients: there it may bend."""
    own = torch.tensor(sorted(numbers), dtype=torch.float64)
    own = own[(own != 0) & torch.isfinite(own)]
    bends = torch.cat([own, (own[:, None] * own).flatten(), (own[:, None] / own).flatten()])
    around = torch.cat([bends * f for f in (0.5, 0.999, 1.001, 2.0)])
    points = torch.cat([_FAR, -_FAR, around, -around])
    values = _Reading(network, nodes, {root: points}).value(last)
    wanted = activation.target(points, *arguments, **activation.kwargs)
    finite = torch.isfinite(values)
    return torch.allclose(values[finite], wanted[finite], rtol=1e-5, atol=1e-6)


def _match(values: Tensor, numbers: list[float]) -> tuple[Activation, tuple[float, ...]] | None:
    if not bool(torch.isfinite(values).all()):
        return None
    for activation in _ACTIVATIONS:
        for arguments in activation.options(numbers):
            wanted = activation.target(_POINTS, *arguments, **activation.kwargs)
            if torch.allclose(values, wanted, rtol=1e-5, atol=1e-6):
                return activation, arguments
    return None


def _is_floating(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


def _behind(last: fx.Node) -> list[fx.Node]:
    """The elementwise operators that a node is computed by, the nearest first."""
    found, todo = [last], [last]
    while todo and len(found) < _MOST_NODES:
        for source in todo.pop(0).all_input_nodes:
            if source not in found and is_call(source, *_PRIMITIVES):
                found.append(source)
                todo.append(source)
    return found


def _roots(network: Network, nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """The values that the operators read and that are no constants."""
    seen = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
    return (source for source in seen if network.constant(source) is None)


class _Reading:
    """What a chain gives at the points that its root takes, and the numbers that stand in it on the way."""

    def __init__(self, network: Network, nodes: list[fx.Node], done: dict[fx.Node, Any]) -> None:
        self.network, self.nodes, self.done = network, nodes, done
        self.numbers: set[float] = set()

    def value(self, node: Any) -> Any:
        """A value at the points; None where it depends on anything but the root."""
        if not isinstance(node, fx.Node):
            if isinstance(node, int | float) and not isinstance(node, bool):
                self.numbers.add(float(node))
            return node
        if node not in self.done:
            self.done[node] = self._computed(node)
        return self.done[node]

    def _computed(self, node: fx.Node) -> Any:
        constant = self.network.constant(node)
        if constant is not None:
            if constant.numel() != 1 or not constant.is_floating_point():
                return None
            self.numbers.add(float(constant))
            return constant.double().reshape(())
        if node not in self.nodes:
            return None
        args = [self.value(arg) for arg in node.args]
        kwargs = {name: self.value(arg) for name, arg in node.kwargs.items()}
        given = zip((*args, *kwargs.values()), (*node.args, *node.kwargs.values()), strict=True)
        if any(found is None and arg is not None for found, arg in given):
            return None
        target: Any = node.target
        return target(*args, **kwargs)


# --- slopes of their own for every channel ----------------------------------------------------------------------------
def _slopes(network: Network, node: fx.Node) -> bool:
    """PReLU: x where x > 0, w x elsewhere, with a slope w for all, or one per channel."""
    if not is_call(node, "where"):
        return False
    parts: Any = node.args
    condition, x, product = parts
    if not (is_call(condition, "gt", "ge") and is_call(product, "mul") and isinstance(x, fx.Node)):
        return False
    slopes = [f for f in product.args[:2] if f is not x]
    weight = network.constant(slopes[0]) if len(slopes) == 1 else None
    shape = node.meta["shape"]
    if (
        list(condition.args[:2]) != [x, 0]
        or weight is None
        or weight.dtype != node.meta["dtype"]
        or x.meta.get("shape") != shape
        or len(shape) < 2
        or not (weight.numel() == 1 or _along_channels(tuple(weight.shape), shape))
    ):
        return False
    slope = slopes[0]
    if weight.ndim != 1:
        slope = network.add_constant(str(slope.target), weight.reshape(-1).contiguous(), before=node)
    put(network, node, aten.prelu.default, x, slope)
    return True


def _along_channels(weight: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    """Whether a constant varies along the second axis of a value alone."""
    full = (1,) * (len(shape) - len(weight)) + weight
    return len(full) == len(shape) and full == (1, shape[1], *(1,) * (len(shape) - 2))
