"""Parallel: linear maps of the same values whose answers are added are one linear map, W1 x + W2 x = (W1 + W2) x.

The branches of blocks that are reparametrized for inference (Ding et al. 2021, RepVGG, arXiv:2101.03697, section 3.3;
Vasu et al. 2023, MobileOne, arXiv:2206.04040), the values themselves included. Spelled apart, their answers cancel in
the sum, and relevance that is shared out by contribution grows by what cancels. Values beside one layer alone are no
such block but a skip connection: people ask what goes past the layer, and it stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from fusion.affine import Coefficients
from fusion.linear import LinearLayer, linear_layer_ending_at
from fusion.network import Network, is_size_arithmetic, op_name
from fusion.normalize import argument
from fusion.passes.plan import Obstacle, Plan, add_layer, fold_beside, name_of


@dataclass(frozen=True)
class Term:
    """A part of a sum: its node, the layer that ends there (None: some other value), and the sums that it is under,
    the innermost first."""

    node: fx.Node
    layer: LinearLayer | None
    sums: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Merge(Plan):
    """A plan that leaves one layer where two terms were: what went, by name, and the node of the layer that took it."""

    gone: str = field(kw_only=True)
    taker: fx.Node = field(kw_only=True)


def plan_parallel(network: Network, total: fx.Node, blocks: Collection[fx.Node] = ()) -> Merge:
    """Make one layer of two that read the same values and end on the two sides of this sum, or of one of the `blocks`
    (the nodes of layers that took in others before) and the values themselves. Raises Obstacle."""
    if not _is_sum(total):
        raise Obstacle("it is no sum of two signals")
    left, right = (list(_terms(network, n, (total,))) for n in total.args[:2])  # type: ignore[arg-type]
    for a in left:
        for b in right:
            for into, other in ((a, b), (b, a)):
                if into.layer is not None and _takes(into.layer, other, blocks):
                    return _plan(network, total, into, into.layer, other)
    raise Obstacle("no two terms of it are linear maps of the same values that one layer can take")


def sums_over(network: Network, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The sums, among these nodes and what reads them, that look at one of them (`_terms`), in the graph's order. Nodes
    that are not in the graph any more count for nothing."""
    living = set(network.graph.nodes)
    found: set[fx.Node] = set()
    todo = [node for node in nodes if node in living]
    while todo:
        node = todo.pop()
        for reader in {node, *node.users} - found:
            if _is_sum(reader):
                found.add(reader)
                if len(reader.users) == 1:  # else it is one part, as it is
                    todo.append(reader)
    return sorted(found)


def _plan(network: Network, total: fx.Node, into: Term, layer: LinearLayer, other: Term) -> Merge:
    above = other.sums[0]

    def edit() -> None:
        if other.layer is not None:
            add_layer(network, layer.node, other.layer.node, _offset(layer, other.layer))
        else:
            one = torch.ones([1] * len(layer.node.meta["shape"]), dtype=torch.float64)
            fold_beside(network, layer.node, Coefficients(one, 0 * one))
        # The fold may have put a bias map behind the layer: what stands beside the term by now.
        rest: fx.Node = above.args[1 - above.args.index(other.node)]  # type: ignore[assignment]
        above.replace_all_uses_with(rest)
        for node in dict.fromkeys((above, *_nodes(other))):
            network.graph.erase_node(node)

    region = frozenset((*into.sums, *other.sums, *_nodes(into), *_nodes(other)))
    gone = name_of(above) if other.layer is None else other.layer.name
    return Merge((edit,), (layer.name,), (), region, (total,), gone=gone, taker=layer.node)


def _nodes(term: Term) -> tuple[fx.Node, ...]:
    """The nodes that compute a layer, the last first; none where the term is no layer."""
    return () if term.layer is None else tuple(dict.fromkeys((term.layer.output, term.layer.node)))


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two signals of one shape."""
    if node.op != "call_function" or is_size_arithmetic(node) or op_name(node) != "add":
        return False
    if argument(node, "alpha", 1) != 1:
        return False
    a, b = node.args[:2]
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    return a.meta.get("shape") == b.meta.get("shape") == node.meta.get("shape")


def _terms(network: Network, node: fx.Node, sums: tuple[fx.Node, ...]) -> Iterator[Term]:
    """The parts that this part of a sum is made of. What is read elsewhere too is one part as it is."""
    alone = list(node.users) == [sums[0]]
    layer = linear_layer_ending_at(network, node)
    if alone and layer is not None:
        yield Term(node, layer, sums)
    elif alone and _is_sum(node):
        for part in node.args[:2]:
            yield from _terms(network, part, (node, *sums))  # type: ignore[arg-type]
    else:
        yield Term(node, None, sums)


def _takes(layer: LinearLayer, other: Term, blocks: Collection[fx.Node]) -> bool:
    """Whether a layer has a place for what another term makes of the same values."""
    if other.layer is None:
        return layer.node in blocks and layer.source is other.node and keeps_places(layer)
    return layer.source is other.layer.source and _offset(layer, other.layer) is not None


def _offset(layer: LinearLayer, other: LinearLayer) -> tuple[int, ...] | None:
    """Where in a layer's kernel another one's begins, by axis; None where it is no part of it. Positions that lie
    outside of the input are zero for both."""
    if (layer.kind, layer.rank, layer.groups) != (other.kind, other.rank, other.groups):
        return None
    if layer.kind != "conv":
        alike = _rest(layer) == _rest(other) and layer.weight.meta["shape"] == other.weight.meta["shape"]
        return (0,) * layer.rank if alike else None
    mine, theirs = window(layer), window(other)
    if mine is None or theirs is None:
        return None
    found = []
    for a, b in zip(mine, theirs, strict=True):
        start, off = divmod(a.padding - b.padding, a.dilation)
        spaced = a.dilation == b.dilation or b.size == 1
        if a.stride != b.stride or off or not spaced or start < 0 or start + b.size > a.size:
            return None
        found.append(start)
    return tuple(found)


def _rest(layer: LinearLayer) -> tuple[Any, ...]:
    """What a call says beside its input, weight and bias."""
    schema = layer.node.target._schema.arguments  # type: ignore[union-attr]
    names = [a.name for a in schema if a.name not in ("input", "weight", "bias")]
    return (layer.node.target, *(argument(layer.node, name) for name in names))


@dataclass(frozen=True)
class Axis:
    """A convolution along one axis."""

    size: int
    stride: int
    padding: int
    dilation: int


Window: TypeAlias = tuple[Axis, ...]


def window(layer: LinearLayer) -> Window | None:
    """How a convolution's kernel moves over its input; None where that is no plain number."""
    if layer.kind != "conv" or not isinstance(layer.node.target, torch._ops.OpOverload):
        return None
    sizes = [int(size) for size in layer.weight.meta["shape"][2:]]
    stride, dilation = (_per_axis(argument(layer.node, name), layer.rank) for name in ("stride", "dilation"))
    given = argument(layer.node, "padding")
    if given == "same":
        padding = [d * (size - 1) // 2 for d, size in zip(dilation, sizes, strict=True)]
    else:
        padding = [0] * layer.rank if given == "valid" else _per_axis(given, layer.rank)
    if any(value is None for value in (*stride, *padding, *dilation)):
        return None
    return tuple(Axis(*values) for values in zip(sizes, stride, padding, dilation, strict=True))


def keeps_places(layer: LinearLayer) -> bool:
    """Whether a layer writes what it reads the shape of, and has a weight that takes each value to its own place."""
    if layer.node.meta["shape"] != layer.source.meta["shape"]:
        return False
    if layer.kind == "linear":
        return True
    axes = window(layer)
    return axes is not None and all(
        axis.stride == 1 and axis.size % 2 == 1 and axis.padding == axis.dilation * (axis.size - 1) // 2
        for axis in axes
    )


def _per_axis(value: object, rank: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [v if isinstance(v, int) else None for v in (values * rank if len(values) == 1 else values)]
