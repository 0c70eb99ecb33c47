"""Files that fix the batch: their constant target shapes made to follow the batch again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor

from fusion.targets import expanded, reshaped
from models.formats.onnx.registry import Node


@dataclass(frozen=True)
class Batched:
    """A target shape: plain sizes, of which those in `where` are multiplied by the batch."""

    plain: tuple[int, ...]
    where: tuple[int, ...]

    def sizes(self, batch: Any) -> list[Any]:
        return [size * batch if i in self.where else size for i, size in enumerate(self.plain)]


def follow_batch(
    node: Node, arguments: tuple[Any, ...], values: Mapping[str, Any], free: SymInt, declared: int | None
) -> tuple[Any, ...]:
    """The arguments of a reshape, expand or resize; its constant target, for `declared` samples, made to fit any."""
    if declared is not None and node.op == "Resize" and len(arguments) == 4:
        return *arguments[:3], _resized(node, arguments[3], values.get(node.inputs[0]), free, declared)
    if declared is None or node.op not in ("Reshape", "Expand") or len(arguments) != 2:
        return arguments
    x, target = values.get(node.inputs[0]), getattr(arguments[1], "value", None)
    if not isinstance(x, Tensor) or target is None:
        return arguments
    shape = coefficients(x, free)
    wanted = [int(v) for v in target.reshape(-1).tolist()]
    if shape is None:
        return arguments
    sizes, axis = shape
    if node.op == "Expand":
        place = expanded(wanted, sizes, axis, declared)
        found = None if place is None else (wanted, [place])
    else:
        zeros = not node.get("allowzero", 0)
        found = reshaped(wanted, sizes, axis, declared, zero_copies=zeros)
    if found is None:
        return arguments
    full, (place, *_) = found
    plain = tuple(size // declared if i == place else size for i, size in enumerate(full))
    return arguments[0], Batched(plain, (place,))


def _resized(node: Node, given: Any, x: Any, free: SymInt, declared: int) -> Any:
    """The sizes that something is resized to."""
    target = getattr(given, "value", None)
    shape = coefficients(x, free) if isinstance(x, Tensor) else None
    if target is None or shape is None:
        return given
    sizes, axis = shape
    axes = [a % len(sizes) for a in node.get("axes") or range(len(sizes))]
    plain = [int(v) for v in target.reshape(-1).tolist()]
    if axis not in axes or plain[axes.index(axis)] != sizes[axis] * declared:
        return given
    place = axes.index(axis)
    return Batched(tuple(sizes[axis] if i == place else size for i, size in enumerate(plain)), (place,))


def coefficients(x: Tensor, free: SymInt) -> tuple[list[int], int] | None:
    """The sizes without the batch, and the one dimension that holds it; None if there is not exactly one."""
    sizes: list[int] = []
    axes: list[int] = []
    for i, size in enumerate(x.shape):
        if not isinstance(size, SymInt):
            sizes.append(int(size))
            continue
        factor = size.node.expr / free.node.expr
        if not factor.is_Integer:
            return None
        sizes.append(int(factor))
        axes.append(i)
    return (sizes, axes[0]) if len(axes) == 1 else None
