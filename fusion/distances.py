"""Layers of distances, y_k = -sum_i |x_i - w_ki| over patches (AdderNet), as a linear layer behind |x - w|.

The sum is a convolution of size one with a group per filter and weights of -1, so that what follows (a batch norm)
folds into those weights like into any others: s_k y_k + t_k has the weights -s_k and the bias t_k. (Chen et al. 2020,
arXiv:1912.13200.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fusion.affine import along
from fusion.linear import LinearLayer
from fusion.network import Network, call, is_size_arithmetic, op_name
from fusion.normalize import argument

aten = torch.ops.aten

_MOVING = {"reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "slice"}
_BATCHES = (2, 3)


@dataclass(frozen=True)
class Distances:
    """What a layer of distances reads: patches x [N, I, L] and centres w [K, I]."""

    patches: fx.Node
    centres: Tensor


def distances(network: Network, layer: LinearLayer) -> Distances | None:
    """The distances that a grouped convolution weighs (as `recognize_distances` writes it), None for other layers."""
    if layer.kind != "conv" or layer.rank != 1 or layer.groups < 2 or not _is(layer.source, "reshape"):
        return None
    differences: Any = layer.source.args[0]
    if not _is(differences, "abs") or not _is(differences.args[0], "sub"):
        return None
    patches, centres = differences.args[0].args[:2]
    w = network.constant(centres)
    if w is None or not _is(patches, "unsqueeze") or patches.args[1] != 1 or w.ndim != 4:
        return None
    grouped = network.constants[str(layer.weight.target)].shape
    if tuple(w.shape) != (1, layer.groups, grouped[1], 1) or tuple(grouped) != (layer.groups, w.shape[2], 1):
        return None
    return Distances(patches.args[0], w.reshape(w.shape[1:3]))


def recognize_distances(network: Network) -> bool:
    """Rewrite every sum of absolute differences between patches and constant filters, in place; whether there was one.

    Where the samples, patches and filters are in the network's own tensors does not matter: it is measured, on index
    tensors for two batch sizes. Needs shapes, and leaves new nodes without.
    """
    found = False
    for node in list(network.graph.nodes):
        chain = _read(network, node)
        if chain is not None:
            _write(network, chain)
            found = True
    if found:
        network.graph.eliminate_dead_code()
    return found


@dataclass(frozen=True)
class _Chain:
    source: fx.Node  # the values [N, C, H, W] whose patches are compared
    unfold: fx.Node  # the im2col call
    path: tuple[fx.Node, ...]  # from the source to the patches as they are subtracted
    total: fx.Node  # the sum
    end: fx.Node  # the answers [N, K, ...]
    after: tuple[fx.Node, ...]  # from the sum to the end
    centres: Tensor  # [K, I]
    sign: float


def _is(node: Any, *ops: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in ops


def _read(network: Network, total: fx.Node) -> _Chain | None:
    if not _is(total, "sum") or not _is(total.args[0], "abs") or not _is(total.args[0].args[0], "sub"):  # type: ignore[union-attr]
        return None
    difference: Any = total.args[0].args[0]  # type: ignore[union-attr]
    operands = difference.args[:2]
    if argument(difference, "alpha", 1) != 1 or argument(total, "keepdim"):
        return None
    for patches, constant in (operands, operands[::-1]):
        w = network.constant(constant)
        path = _path(patches) if w is not None and isinstance(patches, fx.Node) else None
        if w is None or path is None:
            continue
        source, unfold, nodes = path
        axes = _axes(total, difference, patches, w)
        if axes is None:
            return None
        centres = w.reshape([1] * (len(difference.meta["shape"]) - w.ndim) + list(w.shape))
        centres = centres.movedim(axes, (0, 1)).reshape(centres.shape[axes[0]], centres.shape[axes[1]])
        for after in _ways_on(total):
            end = after[-1]
            negative = sum(_is(n, "neg") for n in after) % 2
            chain = _Chain(source, unfold, nodes, total, end, after, centres, -1.0 if negative else 1.0)
            if all(_agrees(network, chain, axes, batch) for batch in _BATCHES):
                return chain
    return None


def _path(patches: fx.Node) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]] | None:
    """(source, im2col, nodes from the source on) behind an operand."""
    nodes: list[fx.Node] = []
    node: Any = patches
    unfold = None
    while unfold is None or node.meta["shape"][:1] != (None,) or len(node.meta["shape"]) != 4:
        if not _is(node, "im2col", *_MOVING) or (unfold is not None and not _is(node, *_MOVING)):
            return None
        unfold = node if _is(node, "im2col") else unfold
        nodes.append(node)
        node = node.args[0]
    return (node, unfold, tuple(reversed(nodes))) if None not in node.meta["shape"][1:] else None


def _axes(total: fx.Node, difference: fx.Node, patches: fx.Node, w: Tensor) -> tuple[int, int] | None:
    """The axes of the filters and of a patch's values in the difference."""
    shape = difference.meta["shape"]
    rank = len(shape)
    summed = argument(total, "dim") or []
    wide = [1] * (rank - w.ndim) + list(w.shape)
    narrow = [1] * (rank - len(patches.meta["shape"])) + list(patches.meta["shape"])
    others = [a for a in range(rank) if wide[a] != 1]
    if len(summed) != 1 or len(others) != 2 or summed[0] % rank not in others:
        return None
    inputs = summed[0] % rank
    filters = others[0] if others[1] == inputs else others[1]
    return (filters, inputs) if narrow[filters] == 1 and narrow[inputs] == wide[inputs] else None


def _ways_on(total: fx.Node) -> list[tuple[fx.Node, ...]]:
    """The ways on from the sum through nodes with one reader, to where the samples come first; the longest first."""
    nodes = [total]
    while len(nodes[-1].users) == 1 and _is(next(iter(nodes[-1].users)), "neg", *_MOVING):
        nodes.append(next(iter(nodes[-1].users)))
    ends = [i for i, n in enumerate(nodes) if n.meta["shape"][0] is None and None not in n.meta["shape"][1:]]
    return [tuple(nodes[: i + 1]) for i in reversed(ends) if len(nodes[i].meta["shape"]) > 2]


def _agrees(network: Network, chain: _Chain, axes: tuple[int, int], batch: int) -> bool:
    """Whether answer [n, k, l] is the sum over patch l of sample n with filter k."""
    filters, inputs = axes
    shape = [batch, *chain.source.meta["shape"][1:]]
    index = torch.arange(1.0, 1.0 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    expected = aten.im2col.default(index, *chain.unfold.args[1:])  # [N, I, L]; padding is 0
    try:
        found = _through(chain.path, index, chain.source, batch)
        rank = len(chain.total.args[0].meta["shape"])  # type: ignore[union-attr]
        found = found.reshape([1] * (rank - found.ndim) + list(found.shape))
        columns = found.movedim((inputs, filters), (0, 1)).flatten(1)  # [I, P]
        rest = [size for a, size in enumerate(found.shape) if a not in axes]
        count, size = len(chain.centres), columns.shape[1]
        kept = [a for a in range(rank) if a != inputs]
        place = filters - (inputs < filters)
        sizes = [count if a == filters else found.shape[a] for a in kept]
        which = along(torch.arange(float(count), dtype=torch.float64), place, len(sizes))
        where = torch.arange(float(size), dtype=torch.float64).reshape(rest).unsqueeze(place)
        which, where = (
            _through(chain.after[1:], t.expand(sizes), chain.total, batch) for t in (which, where)
        )
    except RuntimeError:  # the sizes of this batch do not fit
        return False
    which, where = which.flatten(2), where.flatten(2)  # [N, K, L]
    if which.shape != (batch, count, expected.shape[2]):
        return False
    right_filter = bool((which == torch.arange(float(count)).reshape(1, -1, 1)).all())
    return right_filter and bool((columns[:, where.long()] == expected.movedim(1, 0).unsqueeze(2)).all())


def _through(nodes: tuple[fx.Node, ...], value: Tensor, source: fx.Node, batch: int) -> Tensor:
    """Run nodes that move values on another value; signs are left out."""
    values: dict[fx.Node, Any] = {source: value}
    for node in nodes:
        if _is(node, "neg"):
            values[node] = values[node.args[0]]  # type: ignore[index]
            continue
        known = {n: values[n] if n in values else _size(n, batch) for n in node.all_input_nodes}
        values[node] = call(node, known)
        source = node
    return values[nodes[-1]] if nodes else value


def _size(node: fx.Node, batch: int) -> int:
    """A size for another batch: what follows the batch is a multiple of it."""
    if op_name(node) == "sym_size":
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        axis: Any = node.args[1]
        size = source.meta["shape"][axis]
        return int(source.meta["example"][axis]) * batch // 2 if size is None else int(size)
    if not is_size_arithmetic(node):
        raise RuntimeError("no size")
    sizes: Mapping[fx.Node, Any] = {n: _size(n, batch) for n in node.all_input_nodes}
    return int(call(node, sizes))


def _write(network: Network, chain: _Chain) -> None:
    end = chain.end
    count, size = chain.centres.shape
    name = str(end.meta.get("layer") or end.name)

    def emit(target: Any, *args: Any) -> fx.Node:
        with network.graph.inserting_before(end):
            new = network.graph.call_function(target, args)
        new.meta = {**end.meta, "layer": chain.total.meta.get("layer", "")}
        return new

    patches = emit(aten.im2col.default, chain.source, *chain.unfold.args[1:])
    w = network.add_constant(
        f"{name}.centres", chain.centres.reshape(1, count, size, 1).contiguous(), before=end
    )
    apart = emit(aten.abs.default, emit(aten.sub.Tensor, emit(aten.unsqueeze.default, patches, 1), w))
    positions = torch.Size(end.meta["shape"][2:]).numel()
    flat = emit(aten.reshape.default, apart, [-1, count * size, positions])
    signs = torch.full((count, size, 1), chain.sign, dtype=chain.centres.dtype)
    weight = network.add_constant(f"{name}.weight", signs, before=end)
    total = emit(aten.conv1d.default, flat, weight, None, [1], [0], [1], count)
    end.replace_all_uses_with(emit(aten.reshape.default, total, [-1, *end.meta["shape"][1:]]))
