"""TorchScript graphs as plain Python data, so that running one needs nothing of torch.jit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.formats.torchscript.packed import Packed, unpack
from models.formats.torchscript.quantized import from_tensor

Constant = Tensor | Packed


@dataclass(frozen=True)
class FunctionRef:
    """A free TorchScript function (`torch.nn.functional.relu`) by its qualified name."""

    name: str


@dataclass(frozen=True)
class Argument:
    """One argument of an operator's schema; `type` as written there (`ScalarType?`, `Tensor[]`)."""

    name: str
    type: str
    keyword: bool


@dataclass(frozen=True, eq=False)
class Node:
    """One operation. `target` is the ATen overload, or None for operations on plain Python values."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    target: Callable[..., Any] | None = None
    arguments: tuple[Argument, ...] = ()

    def __deepcopy__(self, _: dict[int, Any]) -> Node:
        return self  # frozen, and layers find their nodes by identity


@dataclass(frozen=True, eq=False)
class Block:
    """Nodes in order, with the names of the values that enter and leave."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def walk(self) -> Iterator[Node]:
        """All nodes, those of nested blocks included."""
        for node in self.nodes:
            yield node
            for block in node.blocks:
                yield from block.walk()


@dataclass(frozen=True, eq=False)
class Graph:
    """One method or function. `constants` are its tensors and packed weights; `numbers` the 0-d tensors of them as
    numbers: tracing writes the 2 of `2 * x.size(0)` as a tensor, and sizes must stay symbolic."""

    block: Block
    constants: Mapping[str, Constant]
    numbers: Mapping[str, complex]

    def __deepcopy__(self, _: dict[int, Any]) -> Graph:
        return self


_ATTRIBUTES: dict[str, str] = {"i": "i", "f": "f", "s": "s", "is": "is_", "ss": "ss", "fs": "fs"}


def parse_graph(graph: Any) -> Graph:
    """Copies a `torch._C.Graph` (or anything shaped like one)."""
    constants: dict[str, Constant] = {}
    block = _parse_block(graph, constants)
    numbers = {
        n: value.item() for n, value in constants.items() if isinstance(value, Tensor) and value.dim() == 0
    }
    return Graph(block, constants, numbers)


def _parse_block(block: Any, constants: dict[str, Constant]) -> Block:
    return Block(
        inputs=tuple(value.debugName() for value in block.inputs()),
        nodes=tuple(_parse_node(node, constants) for node in block.nodes()),
        outputs=tuple(value.debugName() for value in block.outputs()),
    )


def _parse_node(node: Any, constants: dict[str, Constant]) -> Node:
    kind: str = node.kind()
    outputs = tuple(value.debugName() for value in node.outputs())
    attributes: dict[str, Any]
    if kind == "prim::Constant":
        value = _constant(node)
        if isinstance(value, Tensor | Packed):
            constants[outputs[0]] = value
        attributes = {"value": value}
    else:
        attributes = {name: _attribute(node, name) for name in node.attributeNames()}
    target, arguments = _resolve(node) if kind.startswith("aten::") else (None, ())
    return Node(
        kind=kind,
        inputs=tuple(value.debugName() for value in node.inputs()),
        outputs=outputs,
        attributes=attributes,
        blocks=tuple(_parse_block(block, constants) for block in node.blocks()),
        target=target,
        arguments=arguments,
    )


def _constant(node: Any) -> Any:
    output = node.output()
    if output.type().kind() == "FunctionType":
        return FunctionRef(output.type().annotation_str)
    return as_value(output.toIValue())


def as_value(value: Any) -> Any:
    """A value of a script's as the graphs here run on it: tensors without a past, quantized ones and packed weights as
    floats. Raises UnsupportedOperator for packed weights of unknown kinds."""
    if isinstance(value, torch.ScriptObject):
        return unpack(value)
    if isinstance(value, Tensor):
        return from_tensor(value) if value.is_quantized else value.detach()
    return value


def _attribute(node: Any, name: str) -> Any:
    if node.kindOf(name) == "tys":
        return tuple(kind.annotation_str for kind in node.tys(name))
    reader = _ATTRIBUTES.get(node.kindOf(name))
    return getattr(node, reader)(name) if reader else None


def _resolve(node: Any) -> tuple[Callable[..., Any] | None, tuple[Argument, ...]]:
    """The overload of `torch.ops.aten` that the node's schema names; list and string ops have none."""
    try:
        schema = torch._C.parse_schema(node.schema())
        packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
        target = getattr(packet, schema.overload_name or "default")
    except (AttributeError, RuntimeError):
        return None, ()
    arguments = tuple(Argument(a.name, str(a.real_type), bool(a.kwarg_only)) for a in schema.arguments)
    return target, arguments
