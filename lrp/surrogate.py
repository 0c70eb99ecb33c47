"""Builds the surrogate graph: the fused network with another derivative, whose gradient is the explanation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fusion.distances import distances
from fusion.errors import NothingToExplain, UnsupportedOperator
from fusion.linear import LinearLayer, linear_layer, linear_layer_ending_at
from fusion.network import Network, graph_module, is_size_arithmetic, op_name, retarget, value_dependent
from fusion.normalize import argument
from fusion.outputs import default_of
from fusion.registry import Registry
from lrp.composites import Composite
from lrp.decompose import decomposed
from lrp.distances import distance_layer
from lrp.graft import Place, graft, sink
from lrp.heads import Head, heads, in_shape
from lrp.held import attends, held, is_gated, is_rounding
from lrp.rules import MAGNITUDE, AnyRule, Branch, InputRule, LinearRule, ZBox
from lrp.shares import branched, quotient, redistributed
from lrp.signs import non_negative

aten = torch.ops.aten


@dataclass(frozen=True)
class Surrogate:
    """A program (x, gate, recorder) -> the values of an output; the gradient of one by `gate` is the relevance of x for
    it.

    `whole` returns all outputs that can be explained, `heads`, in their order, each in its head's shape (no tuple
    where it is one), and `program` the one that is explained by default (class scores [N, K], where there are any).
    `gate` is a tensor of ones in the shape of x that multiplies it. `layers` maps the nodes that record in the ledger
    to (layer, operator); `rules` lists the linear layers with their rules; `nodes` maps the network's nodes to those of
    the program that have their values and, times their gradients, their relevance, and to where samples are.
    """

    whole: fx.GraphModule
    program: fx.GraphModule
    heads: tuple[Head, ...]
    layers: dict[str, tuple[str, str]]
    rules: tuple[tuple[LinearLayer, AnyRule], ...]
    nodes: dict[str, tuple[str, Place]]

    @property
    def default(self) -> Head:
        return default_of(self.heads)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about what is explained."""
        return tuple(head.note for head in self.heads if head.note)

    def to(self, device: torch.device) -> Surrogate:
        """The same surrogate on another device."""
        whole = copy.deepcopy(self.whole).to(device=device)
        retarget(whole.graph, device=device)
        whole.recompile()
        return replace(self, whole=whole, program=_only(whole, self.heads, self.default))


def _only(whole: fx.GraphModule, heads: Sequence[Head], head: Head) -> fx.GraphModule:
    """The program for one of the outputs; it shares the weights."""
    if len(heads) == 1:
        return whole
    graph = fx.Graph()
    values = graph.graph_copy(whole.graph, val_map={})
    graph.output(values[heads.index(head)])  # type: ignore[index]
    graph.eliminate_dead_code()
    return fx.GraphModule(whole, graph, class_name="Surrogate")


@dataclass
class Builder:
    """The surrogate graph under construction. `values` maps nodes of the network to nodes of the surrogate."""

    network: Network
    composite: Composite
    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    layers: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dependent = value_dependent(self.network)
        self.places = sample_places(self.network)
        self.signs = non_negative(self.network)
        self.held = held(self.network, self.opened)
        self.x = self.graph.placeholder("x")
        self.gate = self.graph.placeholder("gate")
        self.recorder = self.graph.placeholder("recorder")
        self._memo: dict[tuple[Any, ...], fx.Node] = {}

    # --- emitting ---------------------------------------------------------------------------------------------
    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def once(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Emit, or the node of the same call emitted before."""
        key = (target, *args)
        if key not in self._memo:
            self._memo[key] = self.emit(target, *args)
        return self._memo[key]

    def detached(self, node: fx.Node) -> fx.Node:
        return self.once(aten.detach.default, node)

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A constant under its own name; the same name twice is the same constant."""
        if name in self.network.constants and value is not self.network.constants[name]:
            name = f"{name}__derived"
        key = ("constant", name)
        if key not in self._memo:
            self.constants[name] = value
            self._memo[key] = self.graph.create_node("get_attr", name)
        return self._memo[key]

    def copied(self, node: fx.Node, replace: Callable[[fx.Node], fx.Node] | None = None) -> fx.Node:
        """The network's own call on the surrogate's values."""
        lookup = replace or (lambda n: self.values[n])
        args = fx.node.map_arg(node.args, lookup)
        kwargs = fx.node.map_arg(node.kwargs, lookup)
        return self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def key(self, node: fx.Node) -> str:
        """Register a node in the ledger and return its key."""
        self.layers[node.name] = (str(node.meta.get("layer") or ""), op_name(node))
        return node.name

    def graft(
        self,
        node: fx.Node,
        value: fx.Node,
        carriers: Sequence[fx.Node],
        factors: Sequence[fx.Node | None],
        offsets: Sequence[fx.Node | None] | None = None,
        degree: int = 1,
    ) -> fx.Node:
        offsets = tuple(offsets) if offsets is not None else (None,) * len(carriers)
        return self.emit(
            graft, self.recorder, self.key(node), value, tuple(carriers), tuple(factors), offsets, degree,
            self.place(node),
        )  # fmt: skip

    def sink(
        self, node: fx.Node, constant: fx.Node, like: fx.Node | None = None, place: Place | None = None
    ) -> fx.Node:
        """A constant that keeps, on behalf of `node`, the relevance that it receives."""
        return self.emit(
            sink, self.recorder, self.key(node), constant, self.gated, like, place or self.place(node)
        )

    @property
    def gated(self) -> fx.Node:
        """The input times its gate: everything but input rules reads it."""
        return self.once(aten.mul.Tensor, self.x, self.gate)

    # --- looking ----------------------------------------------------------------------------------------------
    def place(self, node: fx.Node) -> Place:
        return self.places.get(node, (0, 1))

    def opened(self, node: fx.Node) -> bool:
        """Whether the composite lets relevance into what chooses or scales a signal in this product."""
        return (self.composite.attention == "attnlrp" and attends(self.network, node)) or (
            self.composite.gates == "uniform" and is_gated(self.network, node)
        )

    def depends(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.dependent


_RESHAPING = {"reshape", "flatten", "unflatten", "view"}


def sample_places(network: Network) -> dict[fx.Node, Place]:
    """Where the samples are in every tensor. Only a reshape merges or splits the axis that they are on, and it keeps
    the row-major order: how many values are slower than the sample stays the same."""
    places: dict[fx.Node, Place] = {}
    for node in network.graph.nodes:
        # Several results at once (split, chunk) have no shape, but hand the place on.
        shape = node.meta.get("shape") or (None,)
        axis = shape.index(None) if None in shape else 0
        source = next((n for n in node.all_input_nodes if n in places), None)
        outer = 1 if source is None else places[source][1]
        if source is not None and node.op == "call_function" and op_name(node) in _RESHAPING:
            before = source.meta["shape"][: places[source][0]]
            outer = max(1, math.prod(before) * outer // math.prod(shape[:axis]))
        if None in shape:
            places[node] = (axis, outer)
    return places


Emit = Callable[[Builder, fx.Node], fx.Node]
# The surrogate of operators that are no linear layers (lrp.operators fills it).
operator_rule: Registry[Emit] = Registry()


def build_surrogate(network: Network, composite: Composite) -> Surrogate:
    """Rewrite a (fused) network into its surrogate.

    Raises UnsupportedOperator for an operator without a rule, NothingToExplain for a network without an output of
    numbers for each image, BadComposite where the composite does not fit the network.
    """
    import lrp.choices
    import lrp.operators
    import lrp.placement
    import lrp.recurrent  # noqa: F401  (they fill the registry)

    network = decomposed(network)
    if len(network.input_nodes) != 1:
        raise NothingToExplain(
            f"The network has {len(network.input_nodes)} inputs; only networks of one image are explained."
        )
    found = heads(network)
    builder = Builder(network, composite)
    layers = [
        layer for n in network.graph.nodes if (layer := linear_layer(network, n)) and n in builder.dependent
    ]
    routes = _input_routes(builder)
    rules = composite.resolve(layers, {layer for layer in layers if layer.source in routes})
    by_output = {layer.output: layer for layer in layers}
    inner = {layer.node for layer in layers if layer.output is not layer.node} - builder.held
    missing = {head.node for head in found}
    for node in network.graph.nodes:
        if node not in inner:
            builder.values[node] = _surrogate_of(builder, node, by_output, rules, routes)
        missing.discard(node.name)
        if not missing:
            break
    by_name = {node.name: node for node in builder.values}
    results = tuple(
        in_shape(builder.graph, builder.values[node], len(node.meta["shape"]), head)
        for head in found
        for node in (by_name[head.node],)
    )
    builder.graph.output(results[0] if len(results) == 1 else results)
    builder.graph.eliminate_dead_code()
    builder.graph.lint()
    whole = graph_module(builder.constants, builder.graph, "Surrogate")
    left = {node.name for node in whole.graph.nodes}
    nodes = {
        node.name: (value.name, builder.place(node))
        for node, value in builder.values.items()
        if node.op == "call_function"
        and node in builder.dependent
        and node.meta.get("shape") is not None
        and value.name in left
    }
    program = _only(whole, found, default_of(found))
    return Surrogate(whole, program, found, builder.layers, tuple(rules.items()), nodes)


def _surrogate_of(
    builder: Builder,
    node: fx.Node,
    by_output: dict[fx.Node, LinearLayer],
    rules: dict[LinearLayer, AnyRule],
    routes: dict[fx.Node, fx.Node],
) -> fx.Node:
    if node.op == "placeholder":
        return builder.gated
    if node.op == "get_attr":
        name = str(node.target)
        return builder.constant(name, builder.network.constants[name])
    if not builder.depends(node):
        return builder.copied(node)
    if node in builder.held or is_code(node):
        return builder.copied(node, lambda n: _number(builder, n))
    if all(is_code(n) for n in node.all_input_nodes if builder.depends(n)):
        return builder.sink(node, builder.copied(node, lambda n: _number(builder, n)))
    layer = by_output.get(node)
    if layer is not None:
        rule = rules[layer]
        if isinstance(rule, InputRule):
            return _input_layer(builder, layer, rule, routes)
        compared = distances(builder.network, layer)
        if compared is not None:
            return distance_layer(builder, layer, rule, compared)
        return _linear_layer(builder, layer, rule)
    op = op_name(node)
    rule_of = operator_rule.get(op)
    if rule_of is None:
        raise UnsupportedOperator(
            f"aten::{op}", str(node.meta.get("layer") or node.name), "There is no relevance rule for it."
        )
    return rule_of(builder, node)


def is_code(node: fx.Node) -> bool:
    """Whether a node's values are indices or truth values, which are no contributions to anything."""
    dtype = node.meta.get("dtype")
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def _number(builder: Builder, node: fx.Node) -> fx.Node:
    """A value as what is held constant reads it; several tensors at once (split) have no shape, their parts do."""
    value = builder.values[node]
    return builder.detached(value) if node.meta.get("shape") is not None else value


# --- linear layers ----------------------------------------------------------------------------------------------
def _linear_layer(builder: Builder, layer: LinearLayer, rule: LinearRule) -> fx.Node:
    x = builder.values[layer.source]
    nonneg = layer.source in builder.signs
    branches = [
        b for b in rule.branches() if not (b.where == "negative" and _only_positive_counts(layer.output))
    ]
    if len(branches) == 1 and [part for part, _ in branches[0].terms] == ["all"]:
        value = _with_bias_map(builder, layer, _apply(builder, layer, x, *_parameters(builder, layer)))
        bias = _bias_shape(builder, layer, branches[0].bias.name, branches[0].bias.apply)
        denominator = (
            value if bias is None or rule.bias != "omit" else builder.emit(aten.sub.Tensor, value, bias)
        )
        exact = rule.epsilon == 0 and denominator is value
        factor = None if exact else quotient(builder, layer, rule, value, denominator)
        carriers: list[fx.Node] = [value]
        factors: list[fx.Node | None] = [factor]
        offsets: list[fx.Node | None] = [bias]
        if rule.bias == "redistribute" and bias is not None:
            share = bias if factor is None else builder.emit(aten.mul.Tensor, factor, bias)
            magnitudes, even = redistributed(builder, [share], _magnitudes(builder, layer, x, nonneg))
            carriers.append(magnitudes)
            factors.append(even)
            offsets.append(None)
        return builder.graft(layer.output, value, carriers, factors, offsets)
    value = _with_bias_map(
        builder, layer, _apply(builder, layer, builder.detached(x), *_parameters(builder, layer))
    )
    parts = []
    for branch in branches:
        carrier = _carrier(builder, layer, x, branch, nonneg)
        if carrier is not None:
            parts.append((branch, carrier, _bias_shape(builder, layer, branch.bias.name, branch.bias.apply)))
    return branched(builder, layer, rule, value, parts, lambda: _magnitudes(builder, layer, x, nonneg))


def _magnitudes(builder: Builder, layer: LinearLayer, x: fx.Node, nonneg: bool) -> fx.Node:
    """sum_i |a_i w_ik|: how a bias's share is handed to the inputs."""
    weight = _modified(builder, layer.weight, MAGNITUDE.name, MAGNITUDE.apply)
    return _apply(builder, layer, x if nonneg else builder.once(aten.abs.default, x), weight, None)


def _carrier(
    builder: Builder, layer: LinearLayer, x: fx.Node, branch: Branch, nonneg: bool
) -> fx.Node | None:
    """The sum of a branch's terms, without bias."""
    total: fx.Node | None = None
    for part, weighting in branch.terms:
        if nonneg and part == "negative":
            continue
        clamp = {"positive": aten.clamp_min.default, "negative": aten.clamp_max.default}.get(part)
        source = x if clamp is None or nonneg else builder.once(clamp, x, 0)
        weight = _modified(builder, layer.weight, weighting.name, weighting.apply)
        term = _apply(builder, layer, source, weight, None)
        total = term if total is None else builder.emit(aten.add.Tensor, total, term)
    return total


def _only_positive_counts(output: fx.Node) -> bool:
    """True where nothing but the positive outputs can carry relevance: all readers are ReLUs."""
    return bool(output.users) and all(
        user.op == "call_function"
        and (
            op_name(user) in ("relu", "relu6")
            or (op_name(user) == "hardtanh" and argument(user, "min_val") == 0)
        )
        for user in output.users
    )


def _apply(
    builder: Builder, layer: LinearLayer, x: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    rest = layer.node.args[3:]
    kwargs = {k: v for k, v in layer.node.kwargs.items() if k not in ("input", "weight", "bias")}
    return builder.emit(layer.node.target, x, weight, bias, *rest, **kwargs)  # type: ignore[arg-type]


def _parameters(builder: Builder, layer: LinearLayer) -> tuple[fx.Node, fx.Node | None]:
    return builder.values[layer.weight], None if layer.bias is None else builder.values[layer.bias]


def _with_bias_map(builder: Builder, layer: LinearLayer, value: fx.Node) -> fx.Node:
    if layer.bias_map is None:
        return value
    return builder.emit(aten.add.Tensor, value, builder.values[layer.bias_map])


def _modified(builder: Builder, constant: fx.Node, name: str, modify: Callable[[Tensor], Tensor]) -> fx.Node:
    base = str(constant.target)
    value = builder.network.constants[base]
    return builder.constant(f"{base}__{name}" if name else base, modify(value) if name else value)


def _bias_shape(
    builder: Builder, layer: LinearLayer, name: str, modify: Callable[[Tensor], Tensor]
) -> fx.Node | None:
    """The layer's (modified) bias in a shape that broadcasts against its output, None where it has none."""
    if layer.bias_map is not None:
        return _modified(builder, layer.bias_map, name, modify)
    if layer.bias is None:
        return None
    base = str(layer.bias.target)
    value = modify(builder.network.constants[base])
    if not bool(value.any()):
        return None
    shaped = value.reshape(-1, *[1] * layer.rank) if layer.rank else value
    return builder.constant(f"{base}__shaped{layer.rank}_{name}", shaped)


# --- layers that read the input -----------------------------------------------------------------------------------
# Operators that only move values: what they do to values they do to gates.
_ROUTING = {
    "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "slice", "select", "flip", "roll",
    "constant_pad_nd", "pad", "unflatten", "to", "_to_copy", "cat", "stack", "expand", "repeat",
}  # fmt: skip
# Element-wise affine maps of the input (mean and deviation inside the network): relevance stays with its pixel.
_POINTWISE = {"add", "sub", "rsub", "neg", "mul", "div", "batch_norm"}
_COMMUTING = {"add", "sub", "mul"}  # the input may stand on either side (sub: but for its sign)


def _input_routes(builder: Builder) -> dict[fx.Node, fx.Node]:
    """The nodes that hold nothing but moved, shifted and scaled input values, each with the node of its gate."""
    gates: dict[fx.Node, fx.Node] = {}
    for node in builder.network.graph.nodes:
        if node.op == "placeholder":
            gates[node] = builder.gate
        elif node.op == "call_function" and builder.depends(node) and not is_size_arithmetic(node):
            sources = [n for n in node.all_input_nodes if builder.depends(n)]
            if (
                not sources
                or any(n not in gates for n in sources)
                or linear_layer_ending_at(builder.network, node)
            ):
                continue
            op = op_name(node)
            if op in _ROUTING and sources == [
                n for n in node.all_input_nodes if n.meta.get("shape") is not None
            ]:
                if op in ("constant_pad_nd", "pad") and argument(node, "value"):
                    # What is padded with is no input: its gate is zero, not the padding's value.
                    gates[node] = builder.emit(
                        aten.constant_pad_nd.default, gates[sources[0]], node.args[1], 0
                    )
                else:
                    gates[node] = builder.copied(node, lambda n: gates.get(n) or _size(builder, n))
            elif (
                (op in _POINTWISE or is_rounding(node))
                and list(node.args[:2]).count(sources[0]) == 1
                and len(sources) == 1
                and node.meta["shape"] == sources[0].meta["shape"]
                and (sources[0] is node.args[0] or op in _COMMUTING)
            ):
                gate = gates[sources[0]]
                gates[node] = gate
    return gates


def _size(builder: Builder, node: fx.Node) -> fx.Node:
    # A size that follows the batch: the same arithmetic, on the gate, which has the shape of the input.
    key = ("size", node)
    if key not in builder._memo:
        builder._memo[key] = builder.copied(
            node, lambda n: builder.gate if n.op == "placeholder" else _size(builder, n)
        )
    return builder._memo[key]


def _input_layer(
    builder: Builder, layer: LinearLayer, rule: InputRule, routes: dict[fx.Node, fx.Node]
) -> fx.Node:
    gate = routes[layer.source]
    x = builder.detached(builder.values[layer.source])
    value = _with_bias_map(builder, layer, _apply(builder, layer, x, *_parameters(builder, layer)))
    total: fx.Node | None = None
    for term in rule.terms():
        weight = _modified(builder, layer.weight, term.weight.name, term.weight.apply)
        source = gate
        if term.values == "input":
            source = builder.emit(aten.mul.Tensor, x, gate)
        elif term.values in ("low", "high"):
            assert isinstance(rule, ZBox)
            bounds = _bounds(builder, layer.source, rule)[term.values == "high"]
            source = builder.emit(aten.mul.Tensor, bounds, gate)
        answer = _apply(builder, layer, source, weight, None)
        if total is None:
            total = answer if term.sign > 0 else builder.emit(aten.neg.default, answer)
        else:
            total = builder.emit(aten.add.Tensor if term.sign > 0 else aten.sub.Tensor, total, answer)
    assert total is not None
    denominator = builder.detached(total)
    weighting = rule.denominator_bias()
    if rule.bias == "absorb":
        bias = _bias_shape(builder, layer, weighting.name, weighting.apply)
        denominator = denominator if bias is None else builder.emit(aten.add.Tensor, denominator, bias)
    factor = quotient(builder, layer, rule, value, denominator)
    return builder.graft(layer.output, value, [total], [factor])


def _bounds(builder: Builder, source: fx.Node, rule: ZBox) -> tuple[fx.Node, fx.Node]:
    """The least and the largest value that the layer's input can have, given the bounds of the network's input."""
    key = ("bounds", source, rule)
    if key not in builder._memo:
        ends = []
        for name, value in (("low", rule.low), ("high", rule.high)):
            channels = builder.network.inputs[0].shape[1]
            numbers = value if isinstance(value, tuple) else (value,)
            if len(numbers) not in (1, channels):
                from fusion.errors import BadComposite

                raise BadComposite(
                    f"ZBox has {len(numbers)} values for '{name}'; the input has {channels} channels."
                )
            rank = len(builder.network.inputs[0].shape)
            tensor = torch.tensor(numbers, dtype=builder.network.dtype, device=builder.network.device)
            label = f"input__{name}_{value}".replace(".", "p")
            constant = builder.constant(label, tensor.reshape(1, -1, *[1] * (rank - 2)))
            ends.append(
                _through(
                    builder,
                    source,
                    builder.emit(aten.mul.Tensor, builder.emit(torch.ones_like, builder.x), constant),
                    {},
                )
            )
        builder._memo[key] = builder.emit(torch.minimum, *ends)
        builder._memo[(*key, "high")] = builder.emit(torch.maximum, *ends)
    return builder._memo[key], builder._memo[(*key, "high")]


def _through(builder: Builder, node: fx.Node, start: fx.Node, seen: dict[fx.Node, fx.Node]) -> fx.Node:
    """The network's own calls from the input to `node`, on another input."""
    if node.op == "placeholder":
        return start
    if node not in seen:
        seen[node] = (
            builder.copied(node, lambda n: _through(builder, n, start, seen))
            if node.op == "call_function"
            else builder.constant(str(node.target), builder.network.constants[str(node.target)])
        )
    return seen[node]
