"""Files that fix the batch: their constant target shapes made to follow the batch again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor

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
    """The arguments of a reshape or expand; its constant target, for `declared` samples, made to fit any."""
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
    found = (
        _expanded(wanted, sizes, axis, declared)
        if node.op == "Expand"
        else _reshaped(node, wanted, sizes, axis, declared)
    )
    return arguments if found is None else (arguments[0], found)


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


def _expanded(wanted: Sequence[int], sizes: Sequence[int], axis: int, declared: int) -> Batched | None:
    place = axis + len(wanted) - len(sizes)
    if place < 0 or wanted[place] != sizes[axis] * declared:
        return None
    return Batched(tuple(w // declared if i == place else w for i, w in enumerate(wanted)), (place,))


def _reshaped(
    node: Node, wanted: list[int], sizes: Sequence[int], axis: int, declared: int
) -> Batched | None:
    """Where in the target the batch goes: memory order says between which sizes, then neighbours decide."""
    before = list(wanted)
    for i, size in enumerate(wanted):
        if size == 0 and not node.get("allowzero", 0) and i < len(sizes):
            wanted[i] = sizes[i] * (declared if i == axis else 1)
    total = math.prod(sizes) * declared
    if -1 in wanted:
        others = -math.prod(wanted)
        if not others or total % others:
            return None
        wanted[wanted.index(-1)] = total // others
    if math.prod(wanted) != total:
        return None
    place = _place(wanted, sizes, axis, declared)
    if place is None or before[place] in (-1, 0):
        return None  # the target already follows
    return Batched(tuple(w // declared if i == place else w for i, w in enumerate(wanted)), (place,))


def _place(wanted: Sequence[int], sizes: Sequence[int], axis: int, declared: int) -> int | None:
    """The target's dimension that takes the batch.

    With the batch at the outer end of its dimension, as many elements lie before it as in the dimensions
    before; at the inner end, that dimension's own factor comes on top.
    """
    outer = math.prod(sizes[:axis])
    prefixes = list(itertools.accumulate(wanted, lambda a, b: a * b, initial=1))
    ends = (outer, outer * sizes[axis])
    for end in ends:  # a dimension of its own
        for i, size in enumerate(wanted):
            if prefixes[i] == end and size == declared and (end == 1 or declared == 1):
                return i
    for end in ends:
        for i, size in enumerate(wanted):
            if prefixes[i] != end or size % declared:
                continue
            # Features stay whole: before them, the batch joins the dimension before ([L, N, C] to [L*N, C]).
            whole = i == len(wanted) - 1 or list(wanted[i:]) == list(sizes[axis + 1 :])
            if i and whole and wanted[i - 1] % declared == 0:
                return i - 1
            return i  # it joins what follows ([L, N, C] to [L, N*heads, C/heads])
    return None
