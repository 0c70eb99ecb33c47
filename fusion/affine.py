"""Affine maps y = S x + T with constant coefficients: where a graph has them, and how operators commute with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fusion.centred import centred_activation
from fusion.network import Network, Shape, op_name
from fusion.normalize import argument
from fusion.registry import Registry

aten = torch.ops.aten


@dataclass(frozen=True)
class Coefficients:
    """S and T in float64, each of the rank of the tensor they apply to, batch axis first and of size 1; other axes have
    the tensor's size, or 1 where the coefficient is the same along them."""

    scale: Tensor
    shift: Tensor

    @property
    def is_identity(self) -> bool:
        return bool((self.scale == 1).all()) and not bool(self.shift.any())

    def map(self, function: Callable[[Tensor], Tensor]) -> Coefficients:
        return Coefficients(function(self.scale), function(self.shift))

    def broadcast(self) -> tuple[Tensor, Tensor]:
        """S and T in one shape."""
        scale, shift = torch.broadcast_tensors(self.scale, self.shift)  # type: ignore[no-untyped-call]
        return scale, shift

    def full(self, shape: Shape) -> Coefficients:
        """The same, expanded to the tensor's shape (batch 1)."""
        return self.map(lambda t: t.expand([1 if size is None else size for size in shape]))

    def vector(self, axis: int) -> tuple[Tensor, Tensor] | None:
        """(S, T) along one axis, None where they vary along another one too."""
        rank = self.scale.ndim
        axis %= rank
        for t in (self.scale, self.shift):
            if any(size != 1 for i, size in enumerate(t.shape) if i != axis):
                return None
        size = max(self.scale.shape[axis], self.shift.shape[axis])
        scale, shift = (t.reshape(-1).expand(size) for t in (self.scale, self.shift))
        return scale, shift


def compact(coefficients: Coefficients) -> Coefficients:
    """Axes along which nothing varies shrunk to size 1."""

    def shrink(t: Tensor) -> Tensor:
        for axis in range(t.ndim):  # the first too: it need not be the batch ([tokens, batch, channels])
            first = t.narrow(axis, 0, 1)
            if t.shape[axis] > 1 and bool((t == first).all()):
                t = first
        return t

    return coefficients.map(shrink)


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """A vector as a coefficient of a tensor of this rank, varying along one axis."""
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def reshaped(t: Tensor, before: Shape, after: Shape) -> Tensor | None:
    """A coefficient of a tensor of shape `before`, for the same values reshaped to `after`. Samples may be spread over
    the first axis (windows, heads) or gathered from it: None where what is spread over it is not alike.
    """
    if not _batch_first(before) or not _batch_first(after):
        return None
    old, new = ([int(size or 1) for size in shape[1:]] for shape in (before, after))
    inside, outside = math.prod(old), math.prod(new)
    rows = t.expand(max(outside // inside, 1), *old)
    if rows.numel() % outside:
        return None
    parts = rows.reshape(-1, *new)
    return parts[:1] if bool((parts == parts[:1]).all()) else None


def _batch_first(shape: Shape) -> bool:
    return len(shape) > 0 and shape[0] is None and None not in shape[1:]


def then(first: Coefficients, second: Coefficients) -> Coefficients:
    """S2 (S1 x + T1) + T2 = (S2 S1) x + (S2 T1 + T2)."""
    return Coefficients(second.scale * first.scale, second.scale * first.shift + second.shift)


@dataclass(frozen=True)
class AffineNode:
    """A node that applies coefficients to `source`. Where `strip` is given, the node also does something else that must
    stay (it normalizes): strip() turns it into that rest, and the coefficients apply to the node's own output."""

    node: fx.Node
    source: fx.Node
    coefficients: Coefficients
    strip: Callable[[], None] | None = None


Reader = Callable[[Network, fx.Node], "AffineNode | None"]
# The affine map that an operator is, if it is one.
reader: Registry[Reader] = Registry()


def affine_node(network: Network, node: Any) -> AffineNode | None:
    """The constant affine map at this node, None where there is none."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.meta.get("shape") is None:
        return None
    function = reader.get(op_name(node))
    return function(network, node) if function is not None else None


def _constants(network: Network, nodes: list[Any]) -> list[Tensor | None] | None:
    """The tensors behind arguments in float64, None where one of them is computed from the input."""
    values = [network.constant(n) for n in nodes]
    if any(n is not None and v is None for n, v in zip(nodes, values, strict=True)):
        return None
    return [None if v is None else v.double() for v in values]


RUNNING: dict[str, Callable[[fx.Node], bool]] = {
    "batch_norm": lambda n: not argument(n, "training"),
    "instance_norm": lambda n: not argument(n, "use_input_stats"),
}


@reader("batch_norm", "instance_norm")
def _running_statistics(network: Network, node: fx.Node) -> AffineNode | None:
    """gamma (x - mu) / sqrt(var + eps) + beta = s x + t with s = gamma / sqrt(var + eps), t = beta - s mu."""
    rank = len(node.meta["shape"])
    values = _constants(
        network, [argument(node, n) for n in ("weight", "bias", "running_mean", "running_var")]
    )
    if values is None:
        return None
    gamma, beta, mean, var = values
    if not RUNNING[op_name(node)](node):
        return _strip_after(network, node, 1, gamma, beta) if op_name(node) == "instance_norm" else None
    if mean is None or var is None:
        return None
    scale = (torch.ones_like(mean) if gamma is None else gamma) / torch.sqrt(
        var + float(argument(node, "eps"))
    )
    shift = (torch.zeros_like(mean) if beta is None else beta) - scale * mean
    return AffineNode(node, node.args[0], Coefficients(along(scale, 1, rank), along(shift, 1, rank)))  # type: ignore[arg-type]


@reader("group_norm")
def _group_norm(network: Network, node: fx.Node) -> AffineNode | None:
    values = _constants(network, [argument(node, "weight"), argument(node, "bias")])
    return None if values is None else _strip_after(network, node, 1, values[0], values[1])


@reader("layer_norm", "rms_norm")
def _last_axes_norm(network: Network, node: fx.Node) -> AffineNode | None:
    bias = argument(node, "bias") if op_name(node) == "layer_norm" else None
    values = _constants(network, [argument(node, "weight"), bias])
    return None if values is None else _strip_after(network, node, None, values[0], values[1])


def _strip_after(
    network: Network, node: fx.Node, axis: int | None, gamma: Tensor | None, beta: Tensor | None
) -> AffineNode | None:
    """The affine part behind statistics that come from the input; along a channel axis, or (None) the last axes."""
    if gamma is None and beta is None:
        return None
    rank = len(node.meta["shape"])

    def shaped(t: Tensor | None, default: float) -> Tensor:
        if t is None:
            return torch.full([1] * rank, default, dtype=torch.float64)
        return along(t, axis, rank) if axis is not None else t.reshape([1] * (rank - t.ndim) + list(t.shape))

    def strip() -> None:
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        args = list(node.args)
        for i, argument_ in enumerate(schema):
            if argument_.name in ("weight", "bias") and i < len(args):
                args[i] = None
        node.args = tuple(args)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}

    return AffineNode(node, node, Coefficients(shaped(gamma, 1.0), shaped(beta, 0.0)), strip)


def _operands(network: Network, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """(signal, constant in the signal's rank) of a binary operator whose result has the signal's shape."""
    for x, c in (node.args[:2], node.args[1::-1]):
        value = (
            torch.tensor(float(c), dtype=torch.float64) if isinstance(c, int | float) else network.constant(c)
        )
        if not isinstance(x, fx.Node) or value is None or network.constant(x) is not None:
            continue
        shape = node.meta["shape"]
        if x.meta.get("shape") != shape or not shape or value.ndim > len(shape) or not _floating(node):
            continue
        value = value.double().reshape([1] * (len(shape) - value.ndim) + list(value.shape))
        if value.shape[0] == 1:
            return x, value
    return None


def _floating(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


@reader("mul")
def _times(network: Network, node: fx.Node) -> AffineNode | None:
    found = _operands(network, node)
    if found is None:
        return None
    return AffineNode(
        node, found[0], Coefficients(found[1], torch.zeros([1] * found[1].ndim, dtype=torch.float64))
    )


@reader("div")
def _divided(network: Network, node: fx.Node) -> AffineNode | None:
    found = _operands(network, node)
    if (
        found is None
        or found[0] is not node.args[0]
        or argument(node, "rounding_mode")
        or bool((found[1] == 0).any())
    ):
        return None
    return AffineNode(
        node, found[0], Coefficients(1 / found[1], torch.zeros([1] * found[1].ndim, dtype=torch.float64))
    )


@reader("add", "sub", "rsub")
def _plus(network: Network, node: fx.Node) -> AffineNode | None:
    found = _operands(network, node)
    if found is None or centred_activation(network, node) is not None:
        return None
    x, c = found
    a = float(argument(node, "alpha", 1))
    one = torch.ones([1] * c.ndim, dtype=torch.float64)
    first = x is node.args[0]
    # add(x, y) = x + a y, sub(x, y) = x - a y, rsub(x, y) = y - a x
    factors = {"add": (1, a) if first else (a, 1), "sub": (1, -a) if first else (-a, 1)}
    factors["rsub"] = (-a, 1) if first else (1, -a)
    on_x, on_c = factors[op_name(node)]
    return AffineNode(node, x, Coefficients(on_x * one, on_c * c))


@reader("neg")
def _negated(network: Network, node: fx.Node) -> AffineNode | None:
    one = torch.ones([1] * len(node.meta["shape"]), dtype=torch.float64)
    return AffineNode(node, node.args[0], Coefficients(-one, 0 * one))  # type: ignore[arg-type]
