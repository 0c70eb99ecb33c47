"""Values moved along one axis by a constant index: padding by reflection or repetition, and rolling, as operators.

Decomposed programs read `x[:, :, index]` for all of these. An index is known by what it holds, not by how it was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fusion.network import Network
from fusion.normalize import is_call, put

aten = torch.ops.aten

_PADS: dict[str, tuple[Callable[..., Any], ...]] = {
    "reflect": (aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default),
    "replicate": (
        aten.replication_pad1d.default,
        aten.replication_pad2d.default,
        aten.replication_pad3d.default,
    ),
}


def recognize_moves(network: Network) -> None:
    """Write paddings and rolls for the indices that stand for them, in place. Needs shapes, and gives new nodes
    theirs."""
    for node in list(network.graph.nodes):
        chosen = _chosen(network, node)
        if chosen is None:
            continue
        source, axis, index = chosen
        size = source.meta["shape"][axis]
        call = None if size is None else _roll(source, axis, index, size) or _pad(source, axis, index, size)
        if call is not None:
            target, args = call
            put(network, node, target, *args)


def _chosen(network: Network, node: fx.Node) -> tuple[fx.Node, int, list[int]] | None:
    """(x, axis, positions) where the node reads x at constant positions along one axis."""
    source: Any = node.args[0] if node.args else None
    axis: Any
    if not is_call(node, "index", "index_select") or source.meta.get("shape") is None:
        return None
    rank = len(source.meta["shape"])
    if is_call(node, "index_select"):
        axis, chosen = node.args[1:3]
    else:
        given: Any = node.args[1]
        indices = [(i, index) for i, index in enumerate(given) if index is not None]
        if len(indices) != 1:
            return None
        ((axis, chosen),) = indices
    values: Tensor | None = network.constant(chosen)
    if values is None or values.ndim != 1 or values.dtype != torch.int64 or len(node.meta["shape"]) != rank:
        return None
    return source, int(axis) % rank, values.tolist()


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _roll(source: Any, axis: int, index: list[int], size: int) -> Call | None:
    """Position i reads i - s, modulo the size; one roll for several axes."""
    if not index or len(index) != size:
        return None
    shift = -index[0] % size
    if not shift or index != [(i - shift) % size for i in range(size)]:
        return None
    shift = shift if shift <= size // 2 else shift - size
    if is_call(source, "roll") and axis not in source.args[2] and len(source.users) == 1:
        before, shifts, axes = source.args
        return aten.roll.default, (before, [*shifts, shift], [*axes, axis])
    return aten.roll.default, (source, [shift], [axis])


def _pad(source: Any, axis: int, index: list[int], size: int) -> Call | None:
    """Position i reads i - left, reflected at both ends or held between them; one padding for several axes."""
    rank = len(source.meta["shape"])
    padded = rank - 2
    if axis < 2 or not 1 <= padded <= 3 or len(index) <= size:
        return None
    total = len(index) - size
    tried = {"reflect": index[0], "replicate": index.count(0) - 1}
    found = (
        (mode, left)
        for mode, left in tried.items()
        if 0 <= left <= total and index == _read(mode, left, total, size)
    )
    mode, left = next(found, ("", 0))
    if not mode:
        return None
    target = _PADS[mode][padded - 1]
    place = 2 * (rank - 1 - axis)
    before, widths = source, [0] * (2 * padded)
    if source.target is target and len(source.users) == 1 and source.args[1][place : place + 2] == [0, 0]:
        before, widths = source.args[0], list(source.args[1])
    widths[place : place + 2] = [left, total - left]
    return target, (before, widths)


def _read(mode: str, left: int, total: int, size: int) -> list[int] | None:
    positions = range(-left, size + total - left)
    if mode == "replicate":
        return [min(max(i, 0), size - 1) for i in positions]
    if max(left, total - left) >= size:
        return None
    return [size - 1 - abs(size - 1 - abs(i)) for i in positions]
