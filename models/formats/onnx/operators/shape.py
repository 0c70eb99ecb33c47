"""Operators that move, cut, join or retype a tensor without computing on its values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.nn import functional as F

from fusion.errors import BadFile, UnsupportedOperator
from models.formats.onnx.registry import OWN, Node, operator
from models.formats.onnx.values import WIDENED, Numbers, Value, allocation, dtype, ints, numbers, scalar


@operator("Shape")
def shape(node: Node, x: Tensor) -> Numbers:
    return numbers(x.shape[node.get("start", 0) : node.get("end")])


@operator("Size")
def size(node: Node, x: Tensor) -> Numbers:
    return numbers([x.numel()]).reshape(())


@operator("Identity")
def identity(node: Node, x: Tensor) -> Tensor:
    return x


@operator("Dropout", static=(1, 2))
def dropout(node: Node, x: Tensor, ratio: Value | None = None, training: Value | None = None) -> Any:
    """The identity: an explanation is of the network in use. A mask, where one is asked for, is all true."""
    if training is not None and (isinstance(training, Tensor) or bool(training.reshape(-1)[0])):
        raise UnsupportedOperator(
            f"{node.title} in training mode", node.called, "Export the network in evaluation mode."
        )
    return (x, torch.ones_like(x, dtype=torch.bool)) if any(node.outputs[1:]) else x


@operator("Cast", "CastLike")
def cast(node: Node, x: Tensor, like: Tensor | None = None) -> Tensor:
    kind = like.dtype if like is not None else dtype(node.get("to"))
    return x if x.dtype == kind else x.to(kind)


@operator("BitCast", since=26)
def bit_cast(node: Node, x: Tensor) -> Tensor:
    """The same bits as another type, where both are held as they are."""
    kind = dtype(node.get("to"))
    if kind.itemsize != x.dtype.itemsize or node.get("to") in WIDENED:
        raise UnsupportedOperator(f"{node.title} from or to a type that is held in a wider one", node.called)
    return x.view(kind)


@operator("Reshape", since=5, static=(1,))
def reshape(node: Node, x: Tensor, target: Value) -> Tensor:
    """0 keeps the size of the input there, -1 takes what is left."""
    wanted = ints(target, f"The shape of layer '{node.called}'")
    keep = not node.get("allowzero", 0)
    sizes = [x.shape[i] if keep and isinstance(s, int) and s == 0 else s for i, s in enumerate(wanted)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if axis == 1 and x.ndim > 1:
        return x if x.ndim == 2 else x.flatten(1)
    rows = math.prod(x.shape[:axis])
    return x.reshape(rows, math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.get("perm") or tuple(reversed(range(x.ndim))))


@operator("Squeeze", static=(1,))
def squeeze(node: Node, x: Tensor, axes: Value | None = None) -> Tensor:
    chosen = node.get("axes") if axes is None else ints(axes, "The axes of Squeeze")
    if chosen is None:
        chosen = [i for i, s in enumerate(x.shape) if isinstance(s, int) and s == 1]
    if any(isinstance(x.shape[a], SymInt) for a in chosen):
        raise BadFile(
            f"Layer '{node.called}' drops the batch dimension. "
            "Export the network with a dynamic batch dimension."
        )
    return x.squeeze(tuple(chosen))


@operator("Unsqueeze", static=(1,))
def unsqueeze(node: Node, x: Tensor, axes: Value | None = None) -> Tensor:
    chosen = node.get("axes") if axes is None else ints(axes, "The axes of Unsqueeze")
    rank = x.ndim + len(chosen)
    for axis in sorted(a % rank for a in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Concat", since=4)
def concat(node: Node, *tensors: Tensor) -> Tensor:
    """Joins; a constant made for a batch of one (a class token) is repeated for every sample."""
    axis = node.get("axis") % tensors[0].ndim
    if axis == 0 or all(isinstance(t.shape[0], int) and t.shape[0] == tensors[0].shape[0] for t in tensors):
        return torch.cat(tensors, axis)
    batch = next((t.shape[0] for t in tensors if isinstance(t.shape[0], SymInt) or t.shape[0] != 1), 1)
    one = [isinstance(t.shape[0], int) and t.shape[0] == 1 for t in tensors]
    return torch.cat(
        [t.expand(batch, *t.shape[1:]) if o else t for t, o in zip(tensors, one, strict=True)], axis
    )


@operator("Stack", domain=OWN)
def stack(node: Node, *tensors: Tensor) -> Tensor:
    """What the iterations of a loop leave, along a new axis."""
    return torch.stack(tensors, node.get("axis"))


@operator("Split", static=(1,))
def split(node: Node, x: Tensor, sizes: Value | None = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    given = node.get("split") if sizes is None else ints(sizes, "The sizes of Split")
    if given is None:
        count = node.get("num_outputs", len(node.outputs))
        each = math.ceil(x.shape[axis] / count)
        given = [each] * (count - 1) + [x.shape[axis] - each * (count - 1)]
    return tuple(torch.split(x, list(given), axis))


@operator("Slice")
def slice_1(node: Node, x: Tensor) -> Tensor:
    starts, ends = node.get("starts"), node.get("ends")
    return _slice(x, starts, ends, node.get("axes") or range(len(starts)), [1] * len(starts))


@operator("Slice", since=10, static=(1, 2, 3, 4))
def slice_10(
    node: Node, x: Tensor, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None
) -> Tensor:
    first, last = ints(starts, "The start of Slice"), ints(ends, "The end of Slice")
    along = list(range(len(first))) if axes is None else ints(axes, "The axes of Slice")
    return _slice(
        x, first, last, along, [1] * len(first) if steps is None else ints(steps, "The steps of Slice")
    )


def _slice(
    x: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]
) -> Tensor:
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        last = size if isinstance(size, int) else 2**31 - 1
        whole = isinstance(start, int) and start == 0 and isinstance(end, int) and end >= last
        if whole and step == 1:
            continue
        if step < 0:
            picked = range(x.shape[axis])[start:end:step]
            # A flip where it is one, so that the graph says what happens; else a gather.
            backwards = step == -1 and len(picked) == x.shape[axis]
            x = (
                x.flip(axis)
                if backwards
                else x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64))
            )
        else:
            x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return x


@operator("Expand", since=8, static=(1,))
def expand(node: Node, x: Tensor, target: Value) -> Tensor:
    wanted: list[Any] = ints(target, f"The shape of layer '{node.called}'")
    rank = max(len(wanted), x.ndim)
    wanted = [1] * (rank - len(wanted)) + wanted
    have = [1] * (rank - x.ndim) + list(x.shape)
    sizes = [h if isinstance(w, int) and w == 1 else w for w, h in zip(wanted, have, strict=True)]
    return x.expand(allocation(sizes, node.called))


@operator("Tile", since=6, static=(1,))
def tile(node: Node, x: Tensor, repeats: Value) -> Tensor:
    times = ints(repeats, "The repeats of Tile")
    allocation([a * b for a, b in zip(x.shape, times, strict=True)], node.called)
    return x.repeat(times)


_PAD_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Pad", since=2)
def pad_2(node: Node, x: Tensor) -> Tensor:
    return _pad(node, x, node.get("pads"), node.get("value", 0.0))


@operator("Pad", since=11, static=(1, 2, 3))
def pad_11(
    node: Node, x: Tensor, pads: Value, value: Value | None = None, axes: Value | None = None
) -> Tensor:
    amounts = ints(pads, "The amounts of Pad")
    if axes is not None:
        chosen = [a % x.ndim for a in ints(axes, "The axes of Pad")]
        full = [0] * (2 * x.ndim)
        for i, axis in enumerate(chosen):
            full[axis], full[axis + x.ndim] = amounts[i], amounts[i + len(chosen)]
        amounts = full
    return _pad(node, x, amounts, 0.0 if value is None else scalar(value, "The value of Pad"))


def _pad(node: Node, x: Tensor, amounts: Sequence[int], value: float) -> Tensor:
    pairs = list(zip(amounts[: x.ndim], amounts[x.ndim :], strict=True))
    while pairs and pairs[0] == (0, 0):
        pairs.pop(0)
    if not pairs:
        return x
    known = [s for s in x.shape if isinstance(s, int)]
    allocation([*known, *(1 + max(b, 0) + max(e, 0) for b, e in pairs)][-x.ndim :], node.called)
    flat = list(itertools.chain.from_iterable(reversed(pairs)))
    mode = node.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, flat, value=value)
    if mode not in _PAD_MODES or len(pairs) > x.ndim - 1:
        raise UnsupportedOperator(f"{node.title} with mode {mode}", node.called)
    # torch pads like this the last 1, 2 or 3 of dimensions with one or two before them.
    rank = x.ndim
    while len(pairs) < rank - 2:
        pairs.insert(0, (0, 0))
    flat = list(itertools.chain.from_iterable(reversed(pairs)))
    return F.pad(x, flat, mode=_PAD_MODES[mode])


@operator("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    block = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    block = node.get("blocksize")
    n, c, h, w = x.shape
    order = (0, 1, 3, 5, 2, 4) if node.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    y = x.reshape(n, c, h // block, block, w // block, block).permute(order)
    return y.reshape(n, c * block**2, h // block, w // block)


@operator("Trilu", since=14, static=(1,))
def trilu(node: Node, x: Tensor, k: Value | None = None) -> Tensor:
    diagonal = 0 if k is None else ints(k, "The diagonal of Trilu")[0]
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)
