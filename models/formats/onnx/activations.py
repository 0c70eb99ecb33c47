"""Activations that a file writes out in primitives, recognized by what they compute.

Rules hang on activations, and older exporters have none of the newer ones. Whatever ends a chain of elementwise
operators over one value and constants is computed at a few points and compared with the activations that there are, so
that the order of its operators, and where its factors stand, does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.formats.onnx.patterns import Match, Region, pattern
from models.formats.onnx.registry import OWN, Node

Array = npt.NDArray[Any]

_MOST_NODES = 12  # GELU by tanh has nine
_NEWEST = 24
_POINTS = np.concatenate([np.linspace(-9, 9, 37), [-30.0, -3.0, 0.1234, 3.0, 25.0]])


@dataclass(frozen=True)
class Activation:
    """An activation: its function, and the node that has it."""

    op: str
    function: Callable[[Array], Array]
    domain: str = ""
    attributes: tuple[tuple[str, Any], ...] = ()


def _erf(x: Array) -> Array:
    values: Array = np.vectorize(math.erf)(x)
    return values


def _sigmoid(x: Array) -> Array:
    values: Array = 1 / (1 + np.exp(-x))
    return values


def _softplus(x: Array) -> Array:
    values: Array = np.logaddexp(0, x)
    return values


def _gelu_by_tanh(x: Array) -> Array:
    values: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return values


_ACTIVATIONS = (
    Activation("Gelu", lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), OWN),
    Activation("Gelu", _gelu_by_tanh, attributes=(("approximate", "tanh"),)),
    Activation("Silu", lambda x: x * _sigmoid(x), OWN),
    Activation("Swish", lambda x: x * _sigmoid(1.702 * x), attributes=(("alpha", 1.702),)),
    Activation("HardSwish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1), OWN),
    Activation(
        "HardSigmoid", lambda x: np.clip(x / 6 + 0.5, 0, 1), attributes=(("alpha", 1 / 6), ("beta", 0.5))
    ),
    Activation("Mish", lambda x: x * np.tanh(_softplus(x))),
    Activation("Softplus", _softplus),
)

_PRIMITIVES: dict[str, Callable[..., Array]] = {
    "Abs": np.abs,
    "Add": np.add,
    "Div": np.divide,
    "Erf": _erf,
    "Exp": np.exp,
    "Greater": np.greater,
    "Identity": lambda x: x,
    "Less": np.less,
    "Log": np.log,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Pow": np.power,
    "Reciprocal": np.reciprocal,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Sub": np.subtract,
    "Tanh": np.tanh,
    "Where": np.where,
}


# Without one of these a chain is a polynomial or a quotient of two, and no activation.
_BENDING = {"Clip", "Erf", "Exp", "HardSigmoid", "Max", "Min", "Relu", "Sigmoid", "Softplus", "Tanh"}


def _hard_sigmoid(node: Node, x: Array) -> Array:
    values: Array = np.clip(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)
    return values


def _clip(node: Node, x: Array, low: Any = None, high: Any = None) -> Array:
    bounds = [node.get(name) if given is None else given for name, given in (("min", low), ("max", high))]
    return np.clip(
        x, -math.inf if bounds[0] is None else bounds[0], math.inf if bounds[1] is None else bounds[1]
    )


_WITH_ATTRIBUTES: dict[str, Callable[..., Array]] = {"Clip": _clip, "HardSigmoid": _hard_sigmoid}


@pattern("Add")
@pattern("Div")
@pattern("Mul")
@pattern("Where")
def activation(region: Region, node: Node) -> Match | None:
    """The activation that this node is the last operator of."""
    nodes = _behind(region, node)
    if not any(each.op in _BENDING for each in nodes.values()):
        return None
    for root in _roots(region, nodes):
        with np.errstate(all="ignore"):
            values = _computed(region, nodes, node.outputs[0], {root: _POINTS})
            if values is None or np.shape(values) != _POINTS.shape:
                continue
            found = next((a for a in _ACTIVATIONS if _same(values, a.function(_POINTS))), None)
        if found is not None:
            return replace(
                node, op=found.op, domain=found.domain, inputs=(root,), attributes=dict(found.attributes),
                opset=_NEWEST,
            ), node  # fmt: skip
    return None


def _same(values: Array, wanted: Array) -> bool:
    return bool(np.isfinite(values).all()) and np.allclose(values, wanted, rtol=1e-5, atol=1e-6)


def _is_primitive(node: Node) -> bool:
    return not node.domain and (node.op in _PRIMITIVES or node.op in _WITH_ATTRIBUTES)


def _behind(region: Region, last: Node) -> dict[str, Node]:
    """The elementwise operators that a node is computed by, the nearest first, by what they make."""
    found, todo = {last.outputs[0]: last}, [last]
    while todo and len(found) < _MOST_NODES:
        for name in todo.pop(0).inputs:
            maker = region.maker.get(name)
            if maker is not None and name not in found and _is_primitive(maker):
                found[name] = maker
                todo.append(maker)
    return found


def _roots(region: Region, nodes: dict[str, Node]) -> Iterator[str]:
    """The values that the operators read and that are no constants."""
    seen = dict.fromkeys(name for node in nodes.values() for name in node.inputs if name)
    return (name for name in seen if region.constant(name) is None)


def _computed(region: Region, nodes: dict[str, Node], name: str, done: dict[str, Any]) -> Any:
    """A value at the points that the root in `done` takes, None where it depends on anything else."""
    if name not in done:
        done[name] = None if not name else _computed_now(region, nodes, name, done)
    return done[name]


def _computed_now(region: Region, nodes: dict[str, Node], name: str, done: dict[str, Any]) -> Any:
    constant = region.constant(name)
    if constant is not None:
        return float(constant) if constant.numel() == 1 else None
    node = nodes.get(name)
    if node is None:
        return None
    arguments = [_computed(region, nodes, source, done) for source in node.inputs]
    if any(a is None for a, source in zip(arguments, node.inputs, strict=True) if source):
        return None
    if node.op in _WITH_ATTRIBUTES:
        return _WITH_ATTRIBUTES[node.op](node, *arguments)
    return _PRIMITIVES[node.op](*arguments)
