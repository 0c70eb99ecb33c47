"""Where the channels of a tensor inside a network are, as the operators that made it tell."""

from __future__ import annotations

from typing import Any

from torch import fx

from fusion.network import is_size_arithmetic, op_name

_AT_THE_END = ("linear", "layer_norm", "rms_norm")
_AT_ONE = (
    "conv",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "max_pool",
    "avg_pool",
    "adaptive",
    "scaled_dot",
)


def channel_axis(node: fx.Node) -> int:
    """Where the channels are: behind a linear layer at the end, behind a convolution in axis 1 (the heads of attention
    too), wherever a permutation puts them; in token streams [N, T, C] of unknown making at the end, else in axis 1."""
    rank = len(node.meta["shape"])
    found = _known_axis(node, rank)
    if found is None:
        found = rank - 1 if rank == 3 else 1
    return found if node.meta["shape"][found] is not None else rank - 1


def _known_axis(node: Any, rank: int) -> int | None:
    """The channels' axis as the operators that made a tensor of this rank tell it, None where none does."""
    moved: list[list[int]] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        shape, op = node.meta.get("shape"), op_name(node)
        if shape is not None and len(shape) != rank:
            return None
        if op in _AT_THE_END or op.startswith(_AT_ONE):
            axis = rank - 1 if op in _AT_THE_END else 1
            for order in reversed(moved):
                axis = order.index(axis)
            return axis
        if op in ("permute", "transpose"):
            moved.append(_order(node, rank))
        elif op in ("reshape", "view", "matmul", "bmm"):
            return None
        node = next((n for n in node.all_input_nodes if _ranked(n, rank)), None)
    return None


def _order(node: fx.Node, rank: int) -> list[int]:
    """The axes of a permutation's result by their old places."""
    if op_name(node) == "permute":
        return [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr,arg-type]
    order = list(range(rank))
    first, second = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return order


def _ranked(node: fx.Node, rank: int) -> bool:
    """Whether a tensor has this rank, or is several at once (split), which have none."""
    shape = node.meta.get("shape")
    return (
        node.op == "call_function" and (shape is None or len(shape) == rank) and not is_size_arithmetic(node)
    )
