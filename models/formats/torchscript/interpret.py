"""Runs a TorchScript graph node by node on tensors; under torch.export this run is the conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.errors import CaptureError, UnsupportedOperator
from models.formats.torchscript.integers import OPERATORS, call, handles
from models.formats.torchscript.packed import Packed
from models.formats.torchscript.program import Block, FunctionRef, Graph, Node
from models.formats.torchscript.values import ABOUT_TENSORS, CASTS, PRIMS, PYTHON, as_argument

MAX_ITERATIONS = 10_000


class Layer(Protocol):
    """What a graph needs of the layer it belongs to."""

    path: str

    def attribute(self, name: str) -> Any: ...
    def constant(self, graph: Graph, name: str) -> Any: ...
    def function(self, name: str) -> Graph: ...
    def apply(self, node: Node, values: Sequence[Any]) -> Any: ...
    def call(self, method: str, values: Sequence[Any]) -> Any: ...


class Frame:
    """One run of one graph: the values by name."""

    def __init__(self, layer: Layer, graph: Graph) -> None:
        self.layer = layer
        self.graph = graph
        self.values: dict[str, Any] = {}
        self.read: dict[str, complex] = {}  # values that are buffers of one number

    def run(self, arguments: Sequence[Any]) -> Any:
        self.values.update(zip(self.graph.block.inputs, arguments, strict=True))
        results = self.block(self.graph.block)
        return results[0] if len(results) == 1 else tuple(results)

    def block(self, block: Block) -> list[Any]:
        for node in block.nodes:
            result = self.evaluate(node)
            if len(node.outputs) == 1 and node.kind not in MULTIPLE:
                self.values[node.outputs[0]] = result
            elif node.outputs:
                self.values.update(zip(node.outputs, result, strict=True))
        return [self.values[name] for name in block.outputs]

    def evaluate(self, node: Node) -> Any:
        control = CONTROL.get(node.kind)
        if control is not None:
            return control(self, node)
        values = [self.values[name] for name in node.inputs]
        if node.kind in PRIMS:
            return PRIMS[node.kind](node, values)
        if node.kind.startswith("aten::"):
            return self.aten(node, values)
        if node.kind not in OPERATORS:
            raise UnsupportedOperator(node.kind, self.layer.path)
        return self.layer.apply(node, values)

    def aten(self, node: Node, values: list[Any]) -> Any:
        overload = getattr(node.target, "_overloadname", "")
        about = ABOUT_TENSORS.get(f"{node.kind}.{overload}") or ABOUT_TENSORS.get(node.kind)
        if about is not None:
            return about(*values)
        if handles(node, values):
            return self.layer.apply(node, values)
        # Numbers cannot be written over: what a trace does in place gives a new one.
        kind = node.kind if node.kind in PYTHON else node.kind.removesuffix("_")
        if kind in PYTHON:
            numbers = self.graph.numbers
            plain = [numbers.get(name, value) for name, value in zip(node.inputs, values, strict=True)]
            # Constants alone may be a real tensor computation; a constant and a size never is.
            sizes = node.kind in CASTS or not all(isinstance(value, Tensor) for value in values) or not values
            if node.kind in CASTS:
                plain = [self.read.get(name, value) for name, value in zip(node.inputs, plain, strict=True)]
            if sizes and (node.kind in CASTS or not any(isinstance(value, Tensor) for value in plain)):
                result = PYTHON[kind](*plain)
                if kind != node.kind:
                    self.values[node.inputs[0]] = result
                return result
        if node.target is None:
            raise UnsupportedOperator(node.kind, self.layer.path)
        refuse_training(node, values, self.layer.path)
        return self.layer.apply(node, values)


_TENSORS = ("Tensor", "Optional[Tensor]")
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def call_operator(node: Node, values: Sequence[Any], layer: str = "") -> Any:
    """Calls a node's operator, on floats where it takes quantized tensors."""
    return call(node, values, call_overload, layer) if handles(node, values) else call_overload(node, values)


def call_overload(node: Node, values: Sequence[Any]) -> Any:
    """Calls the node's ATen overload, with TorchScript's integers turned into dtypes and the like."""
    composed = COMPOSED.get(node.kind)
    if composed is not None:
        return composed(*values)
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for argument, value in zip(node.arguments, values, strict=False):
        converted = as_argument(value, argument.type)
        if argument.keyword:
            keywords[argument.name] = converted
        else:
            positional.append(converted)
    target: Any = node.target
    if any(
        a.type in _TENSORS and isinstance(v, _NUMBERS) for a, v in zip(node.arguments, values, strict=False)
    ):
        # Traces write sizes as tensors; torch finds the overload that takes them as the numbers they are here.
        target = target.overloadpacket
    return target(*positional, **keywords)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    *_: Any,
) -> Tensor:
    """What traces record for every convolution, as the operator that the author called."""
    rank = weight.dim() - 2
    if transposed:
        up = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        return up(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return (F.conv1d, F.conv2d, F.conv3d)[rank - 1](x, weight, bias, stride, padding, dilation, groups)


def _add_relu(a: Tensor, b: Any, alpha: Any = 1) -> Tensor:
    """Joined by the optimizer for mobile devices."""
    return F.relu(torch.add(a, b, alpha=alpha))


# Operators in place of which the ones are called that an author would have called.
COMPOSED: Mapping[str, Callable[..., Tensor]] = {
    "aten::_convolution": _convolution,
    "aten::_add_relu": _add_relu,
    "aten::_add_relu_": _add_relu,
}


# Operators whose training flag was recorded as a constant: (position of the flag, what makes it matter).
TRAINING: Mapping[str, tuple[int, Callable[[Sequence[Any]], bool]]] = {
    "aten::batch_norm": (5, lambda values: values[3] is not None),
    "aten::instance_norm": (5, lambda values: False),
    "aten::dropout": (2, lambda values: values[1] > 0),
    "aten::dropout_": (2, lambda values: values[1] > 0),
    "aten::feature_dropout": (2, lambda values: values[1] > 0),
    "aten::alpha_dropout": (2, lambda values: values[1] > 0),
}


def refuse_training(node: Node, values: Sequence[Any], layer: str) -> None:
    entry = TRAINING.get(node.kind)
    if entry is not None and values[entry[0]] is True and entry[1](values):
        raise CaptureError(
            f"Layer '{layer or '(top level)'}' was recorded in training mode ({node.kind}): its output "
            "depends on chance or on the other images. Call .eval() before torch.jit.trace and save again."
        )


def _constant(frame: Frame, node: Node) -> Any:
    value = node.attributes["value"]
    held = isinstance(value, Tensor | Packed)
    return frame.layer.constant(frame.graph, node.outputs[0]) if held else value


def _get_attribute(frame: Frame, node: Node) -> Any:
    owner = getattr(frame.values[node.inputs[0]], "script", None)
    if owner is None:
        raise UnsupportedOperator(f"prim::GetAttr[{node.attributes['name']}]", frame.layer.path)
    name = node.attributes["name"]
    if name in owner.numbers:
        frame.read[node.outputs[0]] = owner.numbers[name]
    return owner.attribute(name)


def _call_method(frame: Frame, node: Node) -> Any:
    module, *values = [frame.values[name] for name in node.inputs]
    owner, method = getattr(module, "script", None), node.attributes["name"]
    if owner is None:
        raise UnsupportedOperator(f"prim::CallMethod[{method}]", frame.layer.path)
    if owner is frame.layer:
        return owner.call(method, values)
    return module(*values) if method == "forward" else module(*values, method=method)


def _call_function(frame: Frame, node: Node) -> Any:
    reference, *values = [frame.values[name] for name in node.inputs]
    if not isinstance(reference, FunctionRef):
        raise UnsupportedOperator(node.kind, frame.layer.path)
    return Frame(frame.layer, frame.layer.function(reference.name)).run(values)


def _if(frame: Frame, node: Node) -> Any:
    condition = frame.values[node.inputs[0]]
    if isinstance(condition, Tensor):
        raise UnsupportedOperator(
            "prim::If", frame.layer.path, "It branches on the image itself, so no single graph describes it."
        )
    return frame.block(node.blocks[0] if condition else node.blocks[1])


def _loop(frame: Frame, node: Node) -> Any:
    trips, condition, *carried = [frame.values[name] for name in node.inputs]
    body = node.blocks[0]
    if isinstance(condition, Tensor) or isinstance(trips, Tensor):
        raise UnsupportedOperator("prim::Loop", frame.layer.path, "Its length depends on the image itself.")
    iteration = 0
    while condition and iteration < trips:
        if iteration >= MAX_ITERATIONS:
            hint = f"It runs more than {MAX_ITERATIONS} times."
            raise UnsupportedOperator("prim::Loop", frame.layer.path, hint)
        frame.values.update(zip(body.inputs, [iteration, *carried], strict=True))
        condition, *carried = frame.block(body)
        iteration += 1
    return carried


def _raise(frame: Frame, node: Node) -> Any:
    raise ValueError(f"layer '{frame.layer.path}' says: {frame.values[node.inputs[0]]}")


CONTROL: dict[str, Callable[[Frame, Node], Any]] = {
    "prim::Constant": _constant,
    "prim::GetAttr": _get_attribute,
    "prim::CallMethod": _call_method,
    "prim::CallFunction": _call_function,
    "prim::If": _if,
    "prim::Loop": _loop,
    "prim::RaiseException": _raise,
}

# Nodes that answer one value per output, also when there is a single output.
MULTIPLE = frozenset({"prim::If", "prim::Loop", "prim::ListUnpack", "prim::TupleUnpack"})
