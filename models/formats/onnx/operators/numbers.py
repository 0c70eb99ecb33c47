"""What operators do to numbers: sizes computed from sizes, some of which may be the free batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import SymFloat, SymInt

from models.formats.onnx.registry import Node, arithmetic
from models.formats.onnx.values import Numbers, dtype, ints, numbers


def _elementwise(function: Callable[..., Any], *arrays: Numbers) -> Numbers:
    """Apply a Python function per element, with broadcasting; always an array of objects."""
    spread = np.broadcast_arrays(*(a.astype(object) for a in arrays))
    results = numbers(function(*items) for items in zip(*(a.reshape(-1) for a in spread), strict=True))
    return results.reshape(spread[0].shape)


def _is_int(*items: Any) -> bool:
    return all(isinstance(i, int | SymInt) for i in items)


def _divide(a: Any, b: Any) -> Any:
    """Toward zero for integers; sizes, which are never negative, may as well be floored."""
    if not _is_int(a, b):
        return a / b
    return a // b if isinstance(a, SymInt) or isinstance(b, SymInt) else math.trunc(a / b)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Mod": lambda a, b: a % b,
    "Pow": lambda a, b: a**b,
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "And": lambda a, b: bool(a) and bool(b),
    "Or": lambda a, b: bool(a) or bool(b),
}


@arithmetic(*_BINARY)
def binary(node: Node, a: Numbers, b: Numbers) -> Numbers:
    return _elementwise(_BINARY[node.op], a, b)


@arithmetic("Max", "Min")
def extreme(node: Node, first: Numbers, *rest: Numbers) -> Numbers:
    pick = torch.sym_max if node.op == "Max" else torch.sym_min
    for other in rest:
        first = _elementwise(pick, first, other)
    return first


_UNARY: dict[str, Callable[[Any], Any]] = {
    "Neg": lambda a: -a,
    "Abs": abs,
    "Not": lambda a: not a,
    "Floor": lambda a: a if _is_int(a) else torch.sym_float(math.floor(a)),
    "Ceil": lambda a: a if _is_int(a) else torch.sym_float(math.ceil(a)),
    "Sqrt": lambda a: torch.sym_float(a) ** 0.5,
}


@arithmetic(*_UNARY)
def unary(node: Node, a: Numbers) -> Numbers:
    return _elementwise(_UNARY[node.op], a)


@arithmetic("Where")
def where(node: Node, condition: Numbers, a: Numbers, b: Numbers) -> Numbers:
    return _elementwise(lambda c, x, y: x if bool(c) else y, condition, a, b)


@arithmetic("Cast")
def cast(node: Node, a: Numbers) -> Numbers:
    kind = dtype(node.get("to"))
    if kind == torch.bool:
        return _elementwise(bool, a)
    if kind.is_floating_point:
        return _elementwise(torch.sym_float, a)
    return _elementwise(lambda v: torch.sym_int(v) if isinstance(v, SymFloat | float) else v, a)


@arithmetic("Identity")
def identity(node: Node, a: Numbers) -> Numbers:
    return a


@arithmetic("Shape")
def shape(node: Node, a: Numbers) -> Numbers:
    return numbers(a.shape)


@arithmetic("Concat")
def concat(node: Node, *arrays: Numbers) -> Numbers:
    return np.concatenate([a.astype(object) for a in arrays], axis=node.get("axis", 0))


@arithmetic("Gather")
def gather(node: Node, a: Numbers, indices: Numbers) -> Numbers:
    return np.asarray(
        np.take(a.astype(object), indices.astype(np.int64), axis=node.get("axis", 0)), dtype=object
    )


@arithmetic("Unsqueeze")
def unsqueeze(node: Node, a: Numbers, axes: Numbers | None = None) -> Numbers:
    return np.expand_dims(a, tuple(node.get("axes") if axes is None else ints(axes, "Unsqueeze")))


@arithmetic("Squeeze")
def squeeze(node: Node, a: Numbers, axes: Numbers | None = None) -> Numbers:
    chosen = node.get("axes") if axes is None else ints(axes, "Squeeze")
    return np.squeeze(a, None if chosen is None else tuple(chosen))


@arithmetic("Reshape")
def reshape(node: Node, a: Numbers, target: Numbers) -> Numbers:
    return a.reshape(ints(target, "Reshape"))


@arithmetic("Flatten")
def flatten(node: Node, a: Numbers) -> Numbers:
    return a.reshape(math.prod(a.shape[: node.get("axis", 1)]), -1)


@arithmetic("Transpose")
def transpose(node: Node, a: Numbers) -> Numbers:
    return a.transpose(node.get("perm"))


@arithmetic("Slice")
def slice_(node: Node, a: Numbers, *given: Numbers | None) -> Numbers:
    lists = [None if g is None else ints(g, "Slice") for g in given]
    starts, ends = (lists[0], lists[1]) if lists else (node.get("starts"), node.get("ends"))
    assert starts is not None
    assert ends is not None
    axes = (lists[2] if len(lists) > 2 else node.get("axes")) or range(len(starts))
    steps = (lists[3] if len(lists) > 3 else None) or [1] * len(starts)
    where_to: list[slice] = [slice(None)] * a.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # NumPy clips like ONNX, except that "before the first" must be None for a backward walk.
        where_to[axis] = slice(start, None if step < 0 and end < -a.shape[axis] else end, step)
    return a[tuple(where_to)]


@arithmetic("Expand", fixed=(1,))
def expand(node: Node, a: Numbers, target: Numbers) -> Numbers:
    return np.broadcast_to(a, np.broadcast_shapes(a.shape, tuple(ints(target, "Expand"))))


@arithmetic("Tile", fixed=(1,))
def tile(node: Node, a: Numbers, repeats: Numbers) -> Numbers:
    return np.tile(a, ints(repeats, "Tile"))


@arithmetic("OneHot", fixed=(0, 1))
def one_hot(node: Node, indices: Numbers, depth: Numbers, values: Numbers) -> Numbers:
    """One size among others, as exporters write the repeats of a repeated axis."""
    count = ints(depth, "OneHot")[0]
    off, on = values.reshape(-1).tolist()
    at = np.asarray(indices, dtype=np.int64)[..., None]
    hot = np.where(at < 0, at + count, at) == np.arange(count)
    chosen = numbers(on if item else off for item in hot.reshape(-1)).reshape(hot.shape)
    return np.moveaxis(chosen, -1, node.get("axis", -1))


@arithmetic("ReduceProd")
def product(node: Node, a: Numbers, axes: Numbers | None = None) -> Numbers:
    total = a.reshape(-1).tolist()
    result = numbers([math.prod(total)])
    return result if node.get("keepdims", 1) else result.reshape(())


@arithmetic("ReduceSum")
def summed(node: Node, a: Numbers, axes: Numbers | None = None) -> Numbers:
    result = numbers([sum(a.reshape(-1).tolist())])
    return result if node.get("keepdims", 1) else result.reshape(())


@arithmetic("Split")
def split(node: Node, a: Numbers, sizes: Numbers | None = None) -> tuple[Numbers, ...]:
    given = node.get("split") if sizes is None else ints(sizes, "Split")
    if given is None:
        given = [a.shape[0] // len(node.outputs)] * len(node.outputs)
    return tuple(np.split(a, np.cumsum(given)[:-1].tolist(), axis=node.get("axis", 0)))
