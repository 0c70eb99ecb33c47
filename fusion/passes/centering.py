"""Centering: let everything that a LayerNorm reads be centred where it is written, so that an RMS norm is left.

LayerNorm(x) = gamma (x - mean x) / sqrt(var x + eps) + beta. Where mean x = 0, var x is the mean square, and what is
left is rms_norm. With C = I - 1 1^T / d a linear layer answers centred values by itself: C (W x + b) = (C W) x + C b.
All that is added on the way must be centred too, and nobody may miss the mean: every reader must be a LayerNorm over
the same axis, or something that hands the values on to one. (For pre-norm transformers: Ashkboos et al. 2024, SliceGPT,
arXiv:2401.15024, section 3.1; here as a condition on the graph, so that it holds for any network.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fusion.linear import LinearLayer, linear_layer_ending_at
from fusion.network import Network, call, is_size_arithmetic, op_name
from fusion.normalize import argument
from fusion.passes.forward import AVERAGING, MOVING, mixed_axes
from fusion.passes.plan import Obstacle, Plan, center_outputs, name_of

aten = torch.ops.aten

Edit: TypeAlias = Callable[[], None]
# The axes of a tensor along which it must be centred, counted from the first.
Axis: TypeAlias = int


def plan_centering(network: Network, norm: fx.Node) -> Plan:
    """Centre all that `norm`, a layer_norm, reads, and turn every LayerNorm that reads it into an RMS norm. Raises
    Obstacle."""
    source, axis = _read_by(norm)
    stream: dict[fx.Node, Axis] = {}
    todo: list[tuple[fx.Node, Axis]] = [(source, axis)]
    edits: list[Edit] = []
    into: list[str] = []
    norms: dict[fx.Node, None] = {}
    region: set[fx.Node] = set()
    while todo:
        node, axis = todo.pop()
        if node in stream:
            if stream[node] != axis:
                raise Obstacle(f"'{name_of(node)}' would have to be centred along two axes")
            continue
        stream[node] = axis
        region.add(node)
        layer = linear_layer_ending_at(network, node)
        if layer is not None:
            _must_mix_all(layer, axis, node)
            edits.append(_centre_layer(network, layer))
            into.append(layer.name)
            region.add(layer.node)
        else:
            sources, own = _sources(network, node, axis)
            todo += sources
            edits += own
        for user in node.users:
            if is_size_arithmetic(user):
                continue
            if (
                op_name(user) == "layer_norm"
                and user.op == "call_function"
                and _read_by(user) == (node, axis)
            ):
                norms[user] = None
            else:
                todo.append((user, _axis_behind(network, user, node, axis)))
    if not into:
        raise Obstacle("no linear layer writes it")
    edits += [_root_mean_square(network, n) for n in norms]
    return Plan(
        tuple(edits), tuple(dict.fromkeys(into)), tuple(norms), frozenset({*region, *norms}), tuple(norms)
    )


def _read_by(norm: fx.Node) -> tuple[fx.Node, Axis]:
    source: fx.Node = norm.args[0]  # type: ignore[assignment]
    if len(argument(norm, "normalized_shape")) != 1:
        raise Obstacle("it normalizes over several axes at once, which no layer mixes")
    return source, len(norm.meta["shape"]) - 1


# --- the writers ----------------------------------------------------------------------------------------------------
def _must_mix_all(layer: LinearLayer, axis: Axis, node: fx.Node) -> None:
    if layer.output_axis % len(node.meta["shape"]) != axis:
        raise Obstacle(f"'{layer.name}' writes along another axis than it normalizes")
    if layer.groups != 1:
        raise Obstacle(f"'{layer.name}' writes it in groups, and centering would mix them")


def _centre_layer(network: Network, layer: LinearLayer) -> Edit:
    return lambda: center_outputs(network, layer.node)


def _sources(network: Network, node: fx.Node, axis: Axis) -> tuple[list[tuple[fx.Node, Axis]], list[Edit]]:
    """What must be centred for this node to be, and the constants that are centred on the spot."""
    if node.op != "call_function":
        raise Obstacle(f"'{name_of(node)}' is the network's input")
    op = op_name(node)
    if op in ("layer_norm", "rms_norm") and argument(node, "weight") is None:
        if op == "layer_norm" and argument(node, "bias") is None:
            return [], []  # centred as it comes
        if op == "rms_norm" and len(argument(node, "normalized_shape")) == 1:
            return [(node.args[0], axis)], []  # type: ignore[list-item]
    parts: list[fx.Node]
    if op in ("add", "sub"):
        parts = [n for n in node.args[:2] if isinstance(n, fx.Node)]
        if len(parts) != 2:
            raise Obstacle(f"'{name_of(node)}' adds a number")
    elif op in ("cat", "concat"):
        if int(argument(node, "dim", 0)) % len(node.meta["shape"]) == axis:
            raise Obstacle(f"'{name_of(node)}' joins different values along the axis that it normalizes")
        parts = list(node.args[0])  # type: ignore[arg-type]
    elif op in MOVING or op in AVERAGING:
        parts = [node.args[0]]  # type: ignore[list-item]
    else:
        raise Obstacle(f"'{name_of(node)}' ({op}) writes it, which cannot be centred")
    demands: list[tuple[fx.Node, Axis]] = []
    edits: list[Edit] = []
    for part in dict.fromkeys(parts):
        before = _axis_before(network, node, part, axis)
        value = network.constant(part)
        if value is None:
            demands.append((part, before))
        else:
            edits.append(_centre_constant(network, node, part, value, before))
    return demands, edits


def _centre_constant(network: Network, reader: fx.Node, node: fx.Node, value: Tensor, axis: Axis) -> Edit:
    def edit() -> None:
        wide = value.double()
        centred = network.add_constant(
            str(node.target), (wide - wide.mean(axis, keepdim=True)).to(value.dtype), before=reader
        )
        reader.replace_input_with(node, centred)

    return edit


# --- the axis on the other side of an operator -----------------------------------------------------------------------
def _axis_behind(network: Network, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
    """The axis along which `node` is centred when its source is along `axis`. Raises Obstacle where it needs the
    mean."""
    op = op_name(node) if node.op == "call_function" else ""
    if not op:
        raise Obstacle("the network's output shows its mean")
    shape = node.meta.get("shape") or ()
    if op in ("add", "sub") and len(shape) == len(source.meta["shape"]):
        return axis
    if op in ("cat", "concat") and int(argument(node, "dim", 0)) % len(shape) != axis:
        return axis
    if op in MOVING and node.args[0] is source and shape:
        found = _moved(network, node, axis)
        if found is not None:
            return found
    if op in AVERAGING and node.args[0] is source:
        return _averaged(node, axis)
    raise Obstacle(f"'{name_of(node)}' ({op}) reads its mean too")


def _axis_before(network: Network, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
    """The axis along which a source must be centred for `node` to be along `axis`."""
    op, rank = op_name(node), len(source.meta["shape"])
    if op in ("add", "sub", "cat", "concat"):
        before = axis - (len(node.meta["shape"]) - rank)
        whole = before >= 0 and source.meta["shape"][before] == node.meta["shape"][axis]
        if not whole:
            raise Obstacle(f"'{name_of(node)}' adds the same number to all values")
        return before
    size = node.meta["shape"][axis]
    for before in range(rank):
        if source.meta["shape"][before] != size:
            continue
        behind = _averaged(node, before) if op in AVERAGING else _moved(network, node, before)
        if behind == axis:
            return before
    raise Obstacle(f"'{name_of(node)}' ({op}) reorders the values that it normalizes")


def _averaged(node: fx.Node, axis: Axis) -> Axis:
    """The mean of centred values is centred, as long as it is taken over other axes."""
    mixed = mixed_axes(node, len(node.args[0].meta["shape"]))  # type: ignore[union-attr]
    if axis in mixed:
        raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) averages over the axis that it normalizes")
    removed = op_name(node) in ("mean", "sum") and not argument(node, "keepdim")
    return axis - sum(m < axis for m in mixed) if removed else axis


def _moved(network: Network, node: fx.Node, axis: Axis) -> Axis | None:
    """Where an axis goes in an operator that only moves values: the output's axis along which whole fibres of the
    source's axis lie, in order; None where fibres are cut or mixed."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    if source.meta["shape"][axis] is None:
        return None
    sizes: list[int] = list(source.meta["example"])
    place = torch.arange(sizes[axis], dtype=torch.float64).reshape(
        [-1 if i == axis else 1 for i in range(len(sizes))]
    )
    others = [1 if i == axis else s for i, s in enumerate(sizes)]
    fibre = torch.arange(float(torch.Size(others).numel()), dtype=torch.float64).reshape(others)
    where, which = (_run(network, node, t.expand(sizes)) for t in (place, fibre))
    if not isinstance(where, Tensor):
        return None
    for behind in range(where.ndim):
        ramp = place.reshape([-1 if i == behind else 1 for i in range(where.ndim)])
        first = which.narrow(behind, 0, 1)
        if (
            where.shape[behind] == sizes[axis]
            and bool((where == ramp).all())
            and bool((which == first).all())
        ):
            return behind
    return None


def _run(network: Network, node: fx.Node, value: Tensor) -> Any:
    """The node's own operator on another tensor in the place of its first argument, for two samples."""

    def lookup(n: fx.Node) -> Any:
        if n is node.args[0]:
            return value
        if is_size_arithmetic(n):
            return n.meta["example"]
        constant = network.constant(n)
        if constant is None:
            raise Obstacle(f"'{name_of(node)}' ({op_name(node)}) also depends on something computed")
        return constant

    if op_name(node) in ("to", "_to_copy"):
        return value
    return call(node, {n: lookup(n) for n in node.all_input_nodes})


# --- the readers ----------------------------------------------------------------------------------------------------
def _root_mean_square(network: Network, norm: fx.Node) -> Edit:
    """gamma x / sqrt(mean(x^2) + eps) + beta."""

    def edit() -> None:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        source, shape, weight, bias, eps = (argument(norm, name) for name in names)
        norm.target = aten.rms_norm.default
        norm.args, norm.kwargs = (source, shape, weight, eps), {}
        if bias is not None:
            with network.graph.inserting_after(norm):
                shifted = network.graph.call_function(aten.add.Tensor)
            shifted.meta = {**norm.meta}
            norm.replace_all_uses_with(shifted)
            shifted.args = (norm, bias)

    return edit
