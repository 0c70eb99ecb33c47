"""Several ONNX nodes that are one operation: matrix products with constant weights here, others where they register.

Each pattern looks at one node and returns its replacement, which stands where the last of the replaced nodes
stood; what is left without readers is dropped later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from models.formats.onnx.explained import explained
from models.formats.onnx.registry import OWN, Node


@dataclass(frozen=True)
class Known:
    """A constant: its value and the name that the file gives it."""

    tensor: Tensor
    name: str


class Region:
    """The nodes around a node: who makes a value, who reads it, which values are constant."""

    def __init__(self, nodes: Iterable[Node], known: dict[str, Known], outputs: Iterable[str]) -> None:
        self.nodes = list(nodes)
        self.known = known
        self.maker = {name: node for node in self.nodes for name in node.outputs if name}
        self.readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    self.readers.setdefault(name, []).append(node)
        self.outputs = set(outputs)

    def only_reader(self, name: str) -> Node | None:
        """The single node that reads a value, unless the value is also an output."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def constant(self, name: str) -> Tensor | None:
        return self.known[name].tensor if name in self.known else None

    def number(self, name: str) -> float | None:
        value = self.constant(name)
        return (
            float(value) if value is not None and value.numel() == 1 and value.is_floating_point() else None
        )

    def operand(self, node: Node, name: str) -> str:
        """The other operand of a binary node."""
        return node.inputs[1] if node.inputs[0] == name else node.inputs[0]

    def add(self, name: str, tensor: Tensor, source: str) -> str:
        """Make a constant, named after the one that it is made of."""
        self.known[name] = Known(tensor, source)
        return name


# A replacement, and the last node that it replaces.
Match = tuple[Node, Node]
_PATTERNS: dict[str, Callable[[Region, Node], Match | None]] = {}


def pattern(
    op: str,
) -> Callable[[Callable[[Region, Node], Match | None]], Callable[[Region, Node], Match | None]]:
    def register(function: Callable[[Region, Node], Match | None]) -> Callable[[Region, Node], Match | None]:
        _PATTERNS[op] = function
        return function

    return register


def simplify(nodes: Iterable[Node], known: dict[str, Known], outputs: Iterable[str]) -> list[Node]:
    """The nodes with every pattern replaced; new constants are added to `known`."""
    region = Region(nodes, known, outputs)
    replaced: dict[tuple[str, ...], Node] = {}
    for node in region.nodes:
        with explained(node):
            match = _PATTERNS[node.op](region, node) if node.domain == "" and node.op in _PATTERNS else None
        if match is not None:
            replaced[match[1].outputs] = match[0]
    return live((replaced.get(node.outputs, node) for node in region.nodes), outputs)


def live(nodes: Iterable[Node], outputs: Iterable[str]) -> list[Node]:
    """The nodes that some output depends on; their outputs that nothing reads lose their names."""
    wanted, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if wanted.intersection(node.outputs):
            wanted.update(name for name in node.inputs if name)
            kept.append(replace(node, outputs=tuple(n if n in wanted else "" for n in node.outputs)))
    return kept[::-1]


@pattern("MatMul")
def matmul(region: Region, node: Node) -> Match | None:
    """x·W (+ b) with constant W [inputs, outputs]: linear with Wᵀ, transposed here once."""
    a, w = node.inputs
    weight = region.constant(w)
    if weight is None or weight.ndim != 2 or a in region.known:
        return None
    inputs = (a, region.add(f"{w}.transposed", weight.t().contiguous(), region.known[w].name))
    reader = region.only_reader(node.outputs[0])
    if reader is not None and reader.op == "Add" and not reader.domain:
        other = region.operand(reader, node.outputs[0])
        bias = region.constant(other)
        if bias is not None and bias.ndim == 1 and bias.shape[0] == weight.shape[1]:
            merged = replace(node, op="Linear", domain=OWN, inputs=(*inputs, other), outputs=reader.outputs)
            return merged, reader
    return replace(node, op="Linear", domain=OWN, inputs=inputs), node


@pattern("Gemm")
def gemm(region: Region, node: Node) -> Match | None:
    """alpha·x·W + beta·b with constant W and b: linear, with both factors in the weights."""
    a, w, *rest = node.inputs
    weight = region.constant(w)
    if weight is None or a in region.known or node.get("transA", 0) or weight.ndim != 2:
        return None
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if not node.get("transB", 0):
        weight = weight.t().contiguous()
    inputs = [
        a,
        w
        if node.get("transB", 0) and alpha == 1
        else region.add(f"{w}.transposed", alpha * weight, region.known[w].name),
    ]
    if rest and rest[0]:
        bias = region.constant(rest[0])
        if (
            bias is None
            or bias.numel() not in (1, weight.shape[0])
            or bias.ndim > 2
            or (bias.ndim == 2 and bias.shape[0] != 1)
        ):
            return None
        plain = bias.ndim == 1 and bias.numel() == weight.shape[0] and beta == 1
        vector = beta * bias.reshape(-1).expand(weight.shape[0]).contiguous()
        inputs.append(
            rest[0] if plain else region.add(f"{rest[0]}.scaled", vector, region.known[rest[0]].name)
        )
    return replace(node, op="Linear", domain=OWN, inputs=tuple(inputs), attributes={}), node
