"""Operators that are read as several others: how to write them down, one function each.

    @lowering("BiasGelu", domain=MICROSOFT)
    def bias_gelu(write: Writer, x: str, bias: str) -> str:
        return write("Gelu", write("Add", x, bias))

A function gets the names of the node's inputs ("" where one is left out) and returns those of its outputs. Attributes
that it does not declare are refused, since they would change what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fusion.errors import UnsupportedOperator
from models.formats.onnx.expansion import Look, expansion
from models.formats.onnx.patterns import Known
from models.formats.onnx.registry import Node

MICROSOFT = "com.microsoft"

# The version of the standard that lowered nodes are written in.
_OPSET = 24


@dataclass
class Writer:
    """Writes the nodes in place of one. `look` finds what is known of a value."""

    node: Node
    known: dict[str, Known]
    look: Look
    nodes: list[Node] = field(default_factory=list)

    def __call__(
        self, op: str, *inputs: str, domain: str = "", opset: int = _OPSET, **attributes: Any
    ) -> str:
        """Write a node of one output and return that one's name. Attributes that are None are left out."""
        return self.several(op, *inputs, count=1, domain=domain, opset=opset, **attributes)[0]

    def several(
        self, op: str, *inputs: str, count: int, domain: str = "", opset: int = _OPSET, **attributes: Any
    ) -> tuple[str, ...]:
        """Write a node and return the names of its `count` outputs."""
        names = tuple(f"{self.node.place}/{len(self.nodes)}.{k}" for k in range(count))
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        given = {key: value for key, value in attributes.items() if value is not None}
        node = replace(
            self.node,
            op=op,
            inputs=inputs,
            outputs=names,
            attributes=given,
            domain=domain,
            opset=opset,
            depth=self.node.depth + 1,
        )
        self.nodes.append(node)
        return names

    def constant(self, value: Any, kind: torch.dtype = torch.float32, name: str = "") -> str:
        """A constant; `name` is that of the weight it is made of."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=kind)
        key = f"{self.node.place}/constant.{len(self.known)}"
        self.known[key] = Known(tensor, name or key)
        return key

    def get(self, attribute: str, default: Any = None) -> Any:
        return self.node.get(attribute, default)

    def given(self, *attributes: str) -> dict[str, Any]:
        """These attributes as the node has them, to hand on to another."""
        return {name: self.get(name) for name in attributes}

    def weight(self, name: str) -> Tensor:
        """The value of an input that has to be a constant."""
        if name not in self.known:
            raise self.refused("with computed weights")
        return self.known[name].tensor

    def rank(self, name: str) -> int | None:
        """The number of dimensions of a value, None where it is not known (yet)."""
        value = self.look(name)
        return None if value is None else len(value.shape)

    def refused(self, why: str, hint: str = "") -> UnsupportedOperator:
        return UnsupportedOperator(f"{self.node.title} {why}", self.node.called, hint)


def channels_first(write: Writer, x: str) -> str:
    """Images [N, H, W, C] as [N, C, H, W]."""
    return write("Transpose", x, perm=(0, 3, 1, 2))


def channels_last(write: Writer, x: str) -> str:
    """Images [N, C, H, W] as [N, H, W, C]."""
    return write("Transpose", x, perm=(0, 2, 3, 1))


# Returns the names of the outputs, or None where it has to know more of its inputs.
Lowering = Callable[..., "str | tuple[str, ...] | None"]


def lowering(*ops: str, domain: str = "", attributes: tuple[str, ...] = ()) -> Callable[[Lowering], Lowering]:
    """Register how operators are written by others; `attributes` are those that the function heeds."""

    def register(function: Lowering) -> Lowering:
        def expand(node: Node, known: dict[str, Known], look: Look) -> list[Node] | None:
            unknown = sorted(set(node.attributes) - set(attributes))
            write = Writer(node, known, look)
            if unknown:
                raise write.refused(f"with the attribute '{unknown[0]}'")
            results = function(write, *node.inputs)
            return None if results is None else finished(write, results)

        for op in ops:
            expansion(op, domain)(expand)
        return function

    return register


def finished(write: Writer, results: str | tuple[str, ...]) -> list[Node]:
    """The written nodes, with the results under the names that the node's outputs have."""
    listed = (results,) if isinstance(results, str) else results
    made = {name for node in write.nodes for name in node.outputs}
    names: dict[str, str] = {}
    passed: list[tuple[str, str]] = []
    for result, output in zip(listed, write.node.outputs, strict=False):
        if output and result in made and result not in names:
            names[result] = output
        elif output:
            passed.append((result, output))
    missing = [output for output in write.node.outputs[len(listed) :] if output]
    if missing:
        raise write.refused(f"with its output '{missing[0]}'")
    nodes = [
        replace(
            node,
            inputs=tuple(names.get(name, name) for name in node.inputs),
            outputs=tuple(names.get(name, name) for name in node.outputs),
        )
        for node in write.nodes
    ]
    for result, output in passed:
        source = names.get(result, result)
        nodes.append(
            replace(write.node, op="Identity", domain="", inputs=(source,), outputs=(output,), attributes={})
        )
    return nodes
