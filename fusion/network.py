"""The captured network: one functional graph of ATen operators with its weights as named constants."""

from __future__ import annotations

import keyword
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fusion.errors import NonFiniteWeights
from fusion.outputs import Kind, kind_of, positions
from fusion.tracing import TRACING

Shape: TypeAlias = tuple[int | None, ...]
Value: TypeAlias = Any

# Batch sizes of the two shape runs: a dimension that differs between them follows the batch. Not 1: torch
# treats sizes of one specially (broadcasting, squeezing).
_SHAPE_BATCHES = (2, 3)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at the border of a network: its name, its shape (None where it follows the batch), its dtype."""

    name: str
    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class OutputSpec(TensorSpec):
    """An output of a network, and what it holds."""

    kind: Kind

    @property
    def explainable(self) -> bool:
        """Whether it holds floating-point numbers for each image of the batch."""
        follows = bool(self.shape) and self.shape[0] is None and None not in self.shape[1:]
        return follows and self.dtype.is_floating_point


@dataclass(frozen=True)
class LayerInfo:
    """One call in the graph, for people: the author's layer name, the operator, the output's shape."""

    node: str
    layer: str
    op: str
    shape: Shape | None


class Network:
    """A network as a functional graph. Immutable by convention: passes work on `copy()`.

    `graph` has a placeholder per input, `get_attr` nodes whose target is a key of `constants`, calls of ATen
    overloads (or of `operator` functions on sizes), and one output. `node.meta` holds `layer` (the author's
    name), `shape` (None where a dimension follows the batch), `dtype`, and `example`: the shape, or a size's value, for
    two samples. The output's has `names` and `kinds` of what is returned, in order (a kind of None follows from the
    shape).
    """

    def __init__(self, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self._places = Counter(str(node.target) for node in graph.nodes if node.op == "get_attr")
        self.constants: dict[str, Tensor] = {n: t for n, t in constants.items() if n in self._places}

    def copy(self) -> Network:
        """The same network with a graph of its own; the weights are shared, not copied."""
        graph = fx.Graph()
        result = graph.graph_copy(self.graph, val_map={})
        output = graph.output(result)
        output.meta = dict(self.output_node.meta)
        return Network(graph, self.constants)

    @property
    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def input_nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def output_values(self) -> tuple[fx.Node, ...]:
        """The nodes whose values the network returns, in order."""
        value = self.output_node.args[0]
        values = value if isinstance(value, tuple | list) else (value,)
        return tuple(node for node in values if isinstance(node, fx.Node))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_spec(node) for node in self.input_nodes)

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """What the network returns, in order, under the author's names."""
        values, meta = self.output_values, self.output_node.meta
        names = meta.get("names") or positions(len(values))
        kinds = meta.get("kinds") or (None,) * len(values)
        return tuple(
            OutputSpec(name, node.meta["shape"], node.meta["dtype"], kind or kind_of(node.meta["shape"]))
            for node, name, kind in zip(values, names, kinds, strict=True)
        )

    def returning(self, names: Sequence[str], kinds: Mapping[str, Kind] | None = None) -> Network:
        """The same network with these of its outputs only, in this order; kinds: what some of them hold."""
        kept = self.copy()
        by_name = dict(zip((spec.name for spec in self.outputs), kept.output_values, strict=True))
        declared = dict(
            zip(by_name, kept.output_node.meta.get("kinds") or (None,) * len(by_name), strict=True)
        )
        output = kept.output_node
        chosen = tuple(by_name[name] for name in names)
        output.args = (chosen[0] if len(chosen) == 1 else chosen,)
        output.meta |= {
            "names": tuple(names),
            "kinds": tuple((kinds or {}).get(name, declared[name]) for name in names),
        }
        kept.graph.eliminate_dead_code()
        kept.graph.lint()
        return Network(kept.graph, kept.constants)

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self.constants.values()), torch.device("cpu"))

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph as an `nn.Module` whose constants are buffers; it shares the weights."""
        return graph_module(self.constants, self.graph, "Network")

    @property
    def parameters(self) -> int:
        """How many numbers the network holds."""
        return sum(t.numel() for t in self.constants.values())

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the graph without recording gradients; returns what the captured network returned."""
        with torch.no_grad():
            return self.module(*inputs)

    def layers(self) -> list[LayerInfo]:
        """Every tensor operation in order of execution."""
        return [
            LayerInfo(node.name, node.meta.get("layer", ""), op_name(node), node.meta.get("shape"))
            for node in self.calls()
        ]

    def calls(self) -> Iterator[fx.Node]:
        """The nodes that compute tensors (size arithmetic left out)."""
        return (n for n in self.graph.nodes if n.op == "call_function" and n.meta.get("shape") is not None)

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Network:
        """The same network on another device or in another floating-point type."""
        target = torch.device(device) if device is not None else None
        old = self.dtype

        def convert(t: Tensor) -> Tensor:
            return t.to(device=target, dtype=dtype if t.is_floating_point() else None)

        moved = Network(self.copy().graph, {name: convert(t) for name, t in self.constants.items()})
        retarget(moved.graph, device=target, dtype=(old, dtype) if dtype is not None else None)
        for node in moved.graph.nodes:
            if dtype is not None and node.meta.get("dtype") == old:
                node.meta["dtype"] = dtype
        return moved

    def constant(self, node: Any) -> Tensor | None:
        """The tensor behind a `get_attr` node, None for everything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.constants[str(node.target)]
        return None

    def has_one_place(self, name: str) -> bool:
        """Whether a constant has one node only, so that nobody but that node's readers reads it. (A node that was taken
        out may still count.)"""
        return self._places[name] == 1

    def add_constant(self, name: str, value: Tensor, before: fx.Node) -> fx.Node:
        """A new constant with a name of its own (a counter is appended where the name is taken)."""
        unique, count = name, 1
        while unique in self.constants:
            count += 1
            unique = f"{name}_{count}"
        self.constants[unique] = value
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", unique)
        self._places[unique] += 1
        node.meta = {"layer": before.meta.get("layer", ""), "shape": tuple(value.shape), "dtype": value.dtype}
        return node


def retarget(
    graph: fx.Graph,
    *,
    device: torch.device | None = None,
    dtype: tuple[torch.dtype, torch.dtype] | None = None,
) -> None:
    """Let casts and creation operators name another device, and another type (old, new) in the place of the old one:
    they carry those that the network was captured with."""

    def rewrite(value: Value) -> Value:
        if isinstance(value, torch.device) and device is not None:
            return device
        if isinstance(value, torch.dtype) and dtype is not None and value == dtype[0]:
            return dtype[1]
        return value

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, rewrite)
        node.kwargs = fx.node.map_aggregate(node.kwargs, rewrite)


def graph_module(constants: Mapping[str, Tensor], graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """The graph as a module. Constants keep their names as attributes, but where an attribute of GraphModule ("graph",
    "code", "meta") or the path of another constant ("a" and "a.b") is in the way, or where a name cannot stand in
    Python: the module is written out as source, in which a name from a file must not become code."""
    reserved = set(dir(fx.GraphModule({}, fx.Graph())))
    parents = {name[:i] for name in constants for i, letter in enumerate(name) if letter == "."}
    names: dict[str, str] = {}
    for name in constants:
        free = name not in parents and name.partition(".")[0] not in reserved and _is_place(name)
        new = name if free else "constant_" + re.sub(r"\W", "_", name, flags=re.ASCII)
        while not free and (new in constants or new in names.values() or new in parents):
            new += "_"
        names[name] = new
    if any(name != new for name, new in names.items()):
        copied = fx.Graph()
        copied.output(copied.graph_copy(graph, val_map={}))
        graph = copied
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = names[str(node.target)]
    return fx.GraphModule({names[name]: t for name, t in constants.items()}, graph, class_name=class_name)


def is_path(name: str) -> bool:
    """Whether a name is one of Python's, or several with dots between them."""
    return name.isascii() and all(
        part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")
    )


def _is_place(name: str) -> bool:
    """Whether a name can stand as an attribute of a module: a path, with numbers as parts too (`layer1.0.weight`): in
    the source these are `getattr(self.layer1, "0")`."""
    first, *rest = name.split(".")
    return is_path(".".join([first, *(part for part in rest if not (part.isascii() and part.isdecimal()))]))


def op_name(node: fx.Node) -> str:
    """`conv2d` for aten.conv2d.default, `mul` for operator.mul: the operator without its overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def prune(network: Network) -> None:
    """Drop what nothing reads, constants too, in place."""
    network.graph.eliminate_dead_code()
    used = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    for name in set(network.constants) - used:
        del network.constants[name]


def _spec(node: fx.Node) -> TensorSpec:
    return TensorSpec(node.name, node.meta["shape"], node.meta["dtype"])


def is_size_arithmetic(node: fx.Node) -> bool:
    """True for nodes that compute sizes, not tensors."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return (
        getattr(node.target, "__module__", "") in ("_operator", "math", "torch")
        or op_name(node) == "sym_size"
    )


def annotate(network: Network) -> Network:
    """Write `shape`, `dtype` and `example` into every node's meta, by two runs on tensors without storage.

    Inputs must carry them already. Returns the same network. Raises whatever the operators raise where the
    graph does not run.
    """
    with TRACING:
        runs = [fake_run(network, batch) for batch in _SHAPE_BATCHES]
    for node in network.graph.nodes:
        first, second = (run.get(node) for run in runs)
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            node.meta["shape"] = tuple(
                a if a == b else None for a, b in zip(first.shape, second.shape, strict=True)
            )
            node.meta["dtype"] = first.dtype
            node.meta["example"] = tuple(first.shape)
        elif node.op != "output":
            node.meta["shape"] = None
            node.meta["dtype"] = None
            node.meta["example"] = first
    return network


def fake_run(
    network: Network, batch: int, look: Callable[[fx.Node, Value], None] = lambda node, value: None
) -> dict[fx.Node, Value]:
    """Every node's value but the output's for so many samples, on tensors without storage; `look` sees each as soon as
    it is there."""
    values: dict[fx.Node, Value] = {}
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        for node in network.graph.nodes:
            if node.op == "placeholder":
                shape = [batch if size is None else size for size in node.meta["shape"]]
                values[node] = torch.empty(shape, dtype=node.meta["dtype"], device=network.device)
            elif node.op == "get_attr":
                values[node] = mode.from_tensor(network.constants[str(node.target)])
            elif node.op == "call_function":
                values[node] = call(node, values)
            else:
                continue
            look(node, values[node])
    return values


def call(node: fx.Node, values: Mapping[fx.Node, Value]) -> Value:
    """Run one call node on the values of its inputs."""
    target: Callable[..., Value] = node.target  # type: ignore[assignment]
    args = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    return target(*args, **kwargs)


def is_finite(t: Tensor) -> bool:
    """Whether floats hold neither NaN nor infinity, in one pass and without a copy."""
    return t.numel() == 0 or all(bool(torch.isfinite(bound)) for bound in t.aminmax())


def check_finite(constants: Mapping[str, Tensor], *, folded: bool = False) -> None:
    """Raise NonFiniteWeights for NaN or infinity; attention masks (-inf among zeros) are no weights and pass.

    folded: constants may be a mask and a bias in one, so -inf passes among other values too.
    """
    bad = []
    for name, t in constants.items():
        if not t.is_floating_point() or is_finite(t):
            continue
        masked = t == -torch.inf
        if not bool((masked | (torch.isfinite(t) if folded else t == 0)).all()):
            bad.append(name)
    if bad:
        raise NonFiniteWeights(bad)


# They read a tensor for its shape, type and device only.
_SHAPE_ONLY = {
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
}


def reads_values(node: fx.Node) -> bool:
    """Whether a node needs the values of the tensors that it is given, not merely their sizes."""
    return node.op != "call_function" or not (is_size_arithmetic(node) or op_name(node) in _SHAPE_ONLY)


def value_dependent(network: Network) -> set[fx.Node]:
    """The nodes whose values depend on the values of the inputs (not merely on their sizes)."""
    found: set[fx.Node] = set()
    for node in network.graph.nodes:
        if node.op == "placeholder" or (
            node.op == "call_function"
            and reads_values(node)
            and any(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem")
}
