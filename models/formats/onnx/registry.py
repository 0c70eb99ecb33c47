"""The table of ONNX operators: one small function each, found by name and by the opset that introduced it.

    @operator("LeakyRelu", since=6)
    def leaky_relu(node: Node, x: Tensor) -> Tensor:
        return F.leaky_relu(x, node.get("alpha", 0.01))

A function gets its node (for the attributes) and its inputs as tensors. Positions named in `static` come as
numbers when they are known; `scalars=True` passes constants of one element as Python numbers. `counting=True` marks
operators that return as much as the values say, and so run on constants only.
`@arithmetic` adds what the operator does to numbers, so that shapes keep the batch free.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from models.formats.onnx.values import Numbers

Function = TypeVar("Function", bound=Callable[..., Any])

# The domain of nodes that the importer itself puts in place of several ONNX ones.
OWN = "clearfold"
# The domains of what ONNX Runtime's optimizer leaves in a file.
OPTIMIZED = ("com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")


@dataclass(frozen=True)
class Node:
    """One ONNX node, without any reference to the file it came from.

    Values that the graphs inside it read from around it follow its own inputs. `depth` counts in how many steps it was
    written in the place of others.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""
    opset: int = 1
    name: str = ""
    scopes: tuple[str, ...] = ()
    layer: str = ""
    depth: int = 0

    @property
    def place(self) -> str:
        """A prefix for names of values inside, which no other node has."""
        return f"{next(name for name in self.outputs if name)}@{self.depth}"

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute's value, or the default that the specification gives."""
        return self.attributes.get(attribute, default)

    @property
    def bodies(self) -> tuple[Body, ...]:
        """The graphs inside."""
        return tuple(value for value in self.attributes.values() if isinstance(value, Body))

    @property
    def captures(self) -> dict[str, str]:
        """What the graphs inside call the values around them, and what those are called here."""
        inner = list(dict.fromkeys(name for body in self.bodies for name in body.captures))
        return dict(zip(inner, self.inputs[len(self.inputs) - len(inner) :], strict=True))

    @property
    def own_inputs(self) -> tuple[str, ...]:
        """The inputs without the values that graphs inside read."""
        return self.inputs[: len(self.inputs) - len(self.captures)]

    @property
    def called(self) -> str:
        """What to call the node in messages: its layer, its own name, or its operator and what it computes."""
        return self.layer or self.name or f"{self.op} -> {next((o for o in self.outputs if o), '')}"

    @property
    def title(self) -> str:
        """The operator as users know it: domain, name, opset."""
        return f"{self.domain or 'ai.onnx'}::{self.op} (opset {self.opset})"


@dataclass(frozen=True)
class Body:
    """A graph inside a node (a branch, what a loop repeats) or a function: nodes over `inputs`, over `captures`, which
    are values around it, and over its own `weights`."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captures: tuple[str, ...]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Operator:
    """How one operator, from one opset on, is computed."""

    since: int
    run: Callable[..., Any]
    static: frozenset[int]
    scalars: bool
    counting: bool


_OPERATORS: dict[tuple[str, str], list[Operator]] = {}
_ARITHMETIC: dict[str, tuple[Callable[..., Numbers], frozenset[int]]] = {}


def operator(
    *names: str,
    since: int = 1,
    static: tuple[int, ...] = (),
    scalars: bool = False,
    counting: bool = False,
    domain: str = "",
) -> Callable[[Function], Function]:
    """Register a function for the operators of these names, from opset `since` on."""

    def register(function: Function) -> Function:
        for name in names:
            versions = _OPERATORS.setdefault((domain, name), [])
            versions.append(Operator(since, function, frozenset(static), scalars, counting))
            versions.sort(key=lambda version: version.since)
        return function

    return register


def arithmetic(*names: str, fixed: tuple[int, ...] = ()) -> Callable[[Function], Function]:
    """Register what the operators of these names do to numbers. Inputs at the positions in `fixed` say how many numbers
    there are in the end, and so have to be known: what has one for every sample is a tensor."""

    def register(function: Function) -> Function:
        _ARITHMETIC.update(dict.fromkeys(names, (function, frozenset(fixed))))
        return function

    return register


def find(node: Node) -> Operator | None:
    """The newest version not newer than the node's opset, or None."""
    versions = [
        v for v in _OPERATORS.get((node.domain, node.op), []) if node.domain == OWN or v.since <= node.opset
    ]
    return versions[-1] if versions else None


def find_arithmetic(node: Node, known: Container[str]) -> Callable[..., Numbers] | None:
    """What the node's operator does to numbers, or None. `known` are the values that are constants."""
    if node.domain or node.op not in _ARITHMETIC:
        return None
    function, fixed = _ARITHMETIC[node.op]
    return function if all(name in known for i, name in enumerate(node.inputs) if i in fixed) else None


def supported() -> dict[str, tuple[int, ...]]:
    """Every operator of the ONNX domain that can be read, with the opsets at which its reading changes."""
    return {
        name: tuple(v.since for v in versions)
        for (domain, name), versions in sorted(_OPERATORS.items())
        if not domain
    }
