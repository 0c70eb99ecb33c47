"""What a fold is made of: edits that are only carried out once every one of them is known to be possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fusion.affine import Coefficients, along, compact
from fusion.linear import LinearLayer, linear_layer
from fusion.network import Network

aten = torch.ops.aten


class Obstacle(Exception):
    """Why an affine map cannot go further this way: for the report."""


@dataclass(frozen=True)
class Plan:
    """Edits that together move a map into the layers named in `into`, or into a batch norm (its node).

    They change the nodes of `region` only, and none of the values of `unchanged`. `folded` are the nodes whose map
    moves.
    """

    edits: tuple[Callable[[], None], ...]
    into: tuple[str | fx.Node, ...]
    folded: tuple[fx.Node, ...]
    region: frozenset[fx.Node]
    unchanged: tuple[fx.Node, ...]

    def carry_out(self) -> None:
        for edit in self.edits:
            edit()


def name_of(node: fx.Node) -> str:
    """The author's name of a node, for reports."""
    return str(node.meta.get("layer") or node.name)


def fold_behind(network: Network, node: fx.Node, coefficients: Coefficients) -> None:
    """Let the linear layer at `node` answer S y + T: W' = S W ; b' = S b + T."""
    layer = _layer(network, node)
    rank = len(layer.node.meta["shape"])
    scale = _vector(coefficients.scale, layer.output_axis)
    weight = layer.scale_outputs(_weight(network, layer), _spread(scale, _outputs(layer)))
    bias = _bias(network, layer, rank) * coefficients.scale + coefficients.shift
    _write(network, layer, weight, bias)


def fold_in_front(network: Network, node: fx.Node, coefficients: Coefficients) -> None:
    """Let the linear layer at `node` read x where it read S x + T: W' = W S ; b' = W T + b, a map where zero padding
    reaches in (the padding is zero behind the affine map, whatever it is in front of it; right for S = 0 too)."""
    layer = _layer(network, node)
    weight = _weight(network, layer)
    shift = coefficients.full(layer.source.meta["shape"]).shift
    answer = layer.function()(shift.contiguous(), weight, None)
    if _is_unpadded(layer) and _vector_or_none(coefficients.shift, layer.output_axis) is not None:
        # Equal everywhere in exact arithmetic; rounding must not turn it into a map.
        answer = compact_to(answer, layer.output_axis)
    bias = _bias(network, layer, answer.ndim) + answer
    scale = _vector(coefficients.scale, layer.output_axis)
    _write(network, layer, layer.scale_inputs(weight, _spread(scale, _inputs(layer))), bias)


def fold_beside(network: Network, node: fx.Node, coefficients: Coefficients) -> None:
    """Let the linear layer at `node` answer W x + b + S x + T: W' = W + S I ; b' = b + T. It must write as many values
    as it reads, and the middle of its kernel, where it has one, must stand on the value itself."""
    layer = _layer(network, node)
    weight = _weight(network, layer).clone()
    scale = _spread(_vector(coefficients.scale, layer.output_axis), _outputs(layer))
    outputs = torch.arange(len(weight))
    middle = [size // 2 for size in weight.shape[2:]]
    places: list[Any] = [outputs, outputs % weight.shape[1], *middle]
    weight[tuple(places)] += scale
    bias = _bias(network, layer, len(layer.node.meta["shape"])) + coefficients.shift
    _write(network, layer, weight, bias)


def add_layer(network: Network, node: fx.Node, other: fx.Node, offset: tuple[int, ...] | None) -> None:
    """Let the linear layer at `node` answer W x + b + V x + c, V x + c being that at `other`: W' = W + V ; b' = b + c.
    offset: where in W's kernel V's begins, by axis."""
    layer, added = _layer(network, node), _layer(network, other)
    weight, more = _weight(network, layer).clone(), _weight(network, added)
    part = weight
    for axis, start in enumerate(offset or (), 2):
        part = part.narrow(axis, start, more.shape[axis])
    part += more
    rank = len(layer.node.meta["shape"])
    _write(network, layer, weight, _bias(network, layer, rank) + _bias(network, added, rank))


def center_outputs(network: Network, node: fx.Node) -> None:
    """Let the linear layer at `node` answer C y, with C = I - 1 1^T / d along its outputs: W' = C W ; b' = C b."""
    layer = _layer(network, node)
    rank = len(layer.node.meta["shape"])
    weight = _weight(network, layer)
    outputs = 1 if layer.kind == "conv_transpose" else 0
    bias = _bias(network, layer, rank)
    axis = layer.output_axis % rank
    if bias.shape[axis] == 1:
        bias = torch.zeros_like(bias)
    _write(
        network,
        layer,
        weight - weight.mean(outputs, keepdim=True),
        bias - bias.mean(axis, keepdim=True),
    )


def compact_to(t: Tensor, axis: int) -> Tensor:
    """The first entry along every axis but one."""
    axis %= t.ndim
    for i in range(t.ndim):
        if i != axis:
            t = t.narrow(i, 0, 1)
    return t


def fits_behind(network: Network, node: fx.Node, coefficients: Coefficients) -> None:
    """Raise Obstacle where the scale does not run along the layer's output axis."""
    layer = _layer(network, node)
    if _vector_or_none(coefficients.scale, layer.output_axis) is None:
        raise Obstacle(f"its scale does not run along the axis that '{layer.name}' writes")


def mixes_alike(layer: LinearLayer, scale: Tensor) -> bool:
    """Whether S W x = W S x though S is no vector along the layer's axis: a linear layer along an axis on which S does
    not vary (token mixers) commutes with it."""
    return layer.kind == "linear" and scale.shape[-1] == 1


def fold_bias_in_front(network: Network, node: fx.Node, coefficients: Coefficients) -> None:
    """Let the linear layer at `node` answer y / S where it answers y to S x + T, S as `mixes_alike` says and without
    zeros: W (S x + T) + b = S (W x + b') with b' = (W T + b) / S."""
    layer = _layer(network, node)
    weight = _weight(network, layer)
    shift = coefficients.full(layer.source.meta["shape"]).shift
    answer = compact(
        Coefficients(coefficients.scale, layer.function()(shift.contiguous(), weight, None))
    ).shift
    _write(network, layer, weight, (_bias(network, layer, answer.ndim) + answer) / coefficients.scale)


def fold_bias_behind(network: Network, node: fx.Node, coefficients: Coefficients) -> None:
    """Let the linear layer at `node` answer S y + T where it is given S x, S as `mixes_alike` says: S (W x + b) + T =
    W (S x) + b' with b' = S b + T."""
    layer = _layer(network, node)
    bias = _bias(network, layer, len(layer.node.meta["shape"]))
    _write(network, layer, _weight(network, layer), bias * coefficients.scale + coefficients.shift)


def fits_in_front(network: Network, node: fx.Node, coefficients: Coefficients) -> None:
    """Raise Obstacle where the scale does not run along the layer's input axis."""
    layer = _layer(network, node)
    if _vector_or_none(coefficients.scale, layer.output_axis) is None:
        raise Obstacle(f"its scale does not run along the axis that '{layer.name}' reads")


def removal(network: Network, node: fx.Node, source: fx.Node) -> Callable[[], None]:
    """The edit that takes a node out: its readers read its source, or what stands in the source's place by then."""
    place = node.args.index(source)

    def edit() -> None:
        node.replace_all_uses_with(node.args[place])  # type: ignore[arg-type]
        network.graph.erase_node(node)

    return edit


def replace_by_affine(network: Network, node: fx.Node, coefficients: Coefficients) -> None:
    """Let a batch norm be S x + T; S and T run along the channels."""
    vectors = coefficients.vector(1)
    assert vectors is not None
    channels, dtype, layer = int(node.meta["shape"][1]), node.meta["dtype"], name_of(node)
    scale, shift = (v.expand(channels) for v in vectors)
    tensors = {"weight": scale, "bias": shift}
    tensors |= {"running_mean": scale.new_zeros(channels), "running_var": scale.new_ones(channels)}
    constants = [
        network.add_constant(f"{layer}.{n}", t.to(dtype).contiguous(), node) for n, t in tensors.items()
    ]
    node.target = aten.batch_norm.default
    node.args = (node.args[0], *constants, False, 0.0, 0.0, False)
    node.kwargs = {}


# --- reading and writing a layer's weights --------------------------------------------------------------------------
def _layer(network: Network, node: fx.Node) -> LinearLayer:
    layer = linear_layer(network, node)
    assert layer is not None
    return layer


def _inputs(layer: LinearLayer) -> int:
    return int(layer.source.meta["shape"][layer.output_axis])


def _outputs(layer: LinearLayer) -> int:
    return int(layer.node.meta["shape"][layer.output_axis])


def _vector_or_none(t: Tensor, axis: int) -> Tensor | None:
    axis %= t.ndim
    return None if any(size != 1 for i, size in enumerate(t.shape) if i != axis) else t.reshape(-1)


def _vector(t: Tensor, axis: int) -> Tensor:
    vector = _vector_or_none(t, axis)
    assert vector is not None
    return vector


def _spread(vector: Tensor, size: int) -> Tensor:
    return vector.expand(size) if vector.numel() == 1 else vector


def _weight(network: Network, layer: LinearLayer) -> Tensor:
    return network.constants[str(layer.weight.target)].double()


def _bias(network: Network, layer: LinearLayer, rank: int) -> Tensor:
    """The layer's bias, a vector or a map, in the rank of its output."""
    total = torch.zeros([1] * rank, dtype=torch.float64)
    if layer.bias is not None:
        axis = layer.output_axis % rank
        total = along(network.constants[str(layer.bias.target)].double(), axis, rank)
    if layer.bias_map is not None:
        total = total + network.constants[str(layer.bias_map.target)].double()
    return total


def _is_unpadded(layer: LinearLayer) -> bool:
    if layer.kind != "conv":
        return layer.kind == "linear"
    padding = layer.node.args[4] if len(layer.node.args) > 4 else layer.node.kwargs.get("padding", 0)
    sizes = padding if isinstance(padding, list | tuple) else [padding]
    return all(size in (0, "valid") for size in sizes)


def _write(network: Network, layer: LinearLayer, weight: Tensor, bias: Tensor) -> None:
    """Give a layer new weights and a new bias, in its own dtype, leaving other readers of the old ones alone."""
    dtype = network.constants[str(layer.weight.target)].dtype
    _set(network, layer, 1, layer.weight, weight.to(dtype), f"{layer.name}.weight")
    bias = compact(Coefficients(bias, bias)).shift
    vector = _vector_or_none(bias, layer.output_axis)
    if vector is not None and layer.bias_map is None:
        spread = _spread(vector, _outputs(layer))
        _set(network, layer, 2, layer.bias, spread.to(dtype).contiguous(), f"{layer.name}.bias")
        return
    full = bias.expand([int(s or 1) for s in layer.node.meta["shape"]]).to(dtype).contiguous()
    if layer.bias_map is not None:
        constant = network.add_constant(f"{layer.name}.bias_map", full, before=layer.output)
        layer.output.update_arg(1, constant)
    else:
        with network.graph.inserting_after(layer.node):
            add = network.graph.call_function(aten.add.Tensor)
        add.meta = {**layer.node.meta}
        layer.node.replace_all_uses_with(add)
        add.args = (layer.node, network.add_constant(f"{layer.name}.bias_map", full, before=layer.node))
    args = list(layer.node.args)
    args[2:3] = [None] if len(args) > 2 else []
    layer.node.args = tuple(args)
    layer.node.kwargs = {k: v for k, v in layer.node.kwargs.items() if k != "bias"}


def _set(
    network: Network, layer: LinearLayer, position: int, old: fx.Node | None, value: Tensor, name: str
) -> None:
    base = name if old is None else str(old.target)
    if old is not None and _only_reader(network, old, layer.node):
        network.constants[base] = value
        return
    constant = network.add_constant(base, value, before=layer.node)
    args = [*layer.node.args, *[None] * (position + 1 - len(layer.node.args))]
    args[position] = constant
    layer.node.args = tuple(args)
    keyword = ("input", "weight", "bias")[position]
    layer.node.kwargs = {k: v for k, v in layer.node.kwargs.items() if k != keyword}


def _only_reader(network: Network, constant: fx.Node, reader: fx.Node) -> bool:
    return network.has_one_place(str(constant.target)) and list(constant.users) == [reader]
