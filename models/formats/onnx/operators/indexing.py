"""Picking and placing elements by index."""

from __future__ import annotations

import torch
from torch import Tensor

from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Counted, Value


@operator("Gather", static=(1,))
def gather(node: Node, x: Tensor, indices: Value) -> Tensor:
    """A single index is a select, a run of them a slice, else an index_select."""
    axis = node.get("axis", 0) % x.ndim
    if isinstance(indices, Tensor):
        flat = indices.reshape(-1)
        flat = torch.where(flat < 0, flat + x.shape[axis], flat)
        y = x.index_select(axis, flat)
        return y.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    picked = [int(i) for i in indices.reshape(-1).tolist()]
    if indices.ndim == 0:
        return x.select(axis, picked[0])
    positive = [i + x.shape[axis] if i < 0 else i for i in picked]
    if (
        positive
        and all(isinstance(i, int) for i in positive)
        and positive == list(range(positive[0], positive[-1] + 1))
    ):
        y = torch.ops.aten.slice.Tensor(x, axis, positive[0], positive[-1] + 1, 1)
    else:
        y = x.index_select(axis, torch.tensor(positive, dtype=torch.int64, device=x.device))
    return y if indices.ndim == 1 else y.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@operator("GatherElements", since=11)
def gather_elements(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


@operator("GatherND", since=11)
def gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    batch = node.get("batch_dims", 0)
    own = [_along(x, i, indices.ndim - 1) for i in range(batch)]
    return x[(*own, *indices.unbind(-1))]


def _along(x: Tensor, axis: int, rank: int) -> Tensor:
    """0, 1, 2, ... as an index of this axis that broadcasts over `rank` dimensions."""
    count = torch.arange(x.shape[axis], device=x.device)
    return count.reshape(*[1] * axis, x.shape[axis], *[1] * (rank - axis - 1))


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("Scatter", "ScatterElements", since=9)
def scatter_elements(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, how = node.get("axis", 0), node.get("reduction", "none")
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices)
    if how == "none":
        return torch.scatter(x, axis, wrapped, updates)
    return torch.scatter_reduce(x, axis, wrapped, updates, _REDUCE[how])


@operator("ScatterND", since=11)
def scatter_nd(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    how = node.get("reduction", "none")
    places = indices.unbind(-1)
    if how in ("none", "add"):
        return torch.index_put(x, places, updates, accumulate=how == "add")
    # torch has the other reductions along one axis only: the indexed ones become one.
    sizes, rest = x.shape[: len(places)], x.shape[len(places) :]
    flat = torch.zeros_like(places[0])
    for size, place in zip(sizes, places, strict=True):
        flat = flat * size + torch.where(place < 0, place + size, place)
    rows = updates.reshape(-1, *rest)
    index = flat.reshape(-1, *[1] * len(rest)).expand(rows.shape)
    return torch.scatter_reduce(x.reshape(-1, *rest), 0, index, rows, _REDUCE[how]).reshape(x.shape)


@operator("TensorScatter", since=24)
def tensor_scatter(node: Node, x: Tensor, update: Tensor, starts: Tensor | None = None) -> Tensor:
    """Each sample's update from its own start on, around the end where the mode is circular."""
    axis, steps = node.get("axis", -2) % x.ndim, update.shape[node.get("axis", -2)]
    begin = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device) if starts is None else starts
    places = begin.unsqueeze(1) + torch.arange(steps, device=x.device)
    if node.get("mode", "linear") == "circular":
        places = torch.remainder(places, x.shape[axis])
    shape = [update.shape[0], *[1] * (x.ndim - 1)]
    shape[axis] = steps
    return torch.scatter(x, axis, places.reshape(shape).expand(update.shape), update)


@operator("ReverseSequence", since=10)
def reverse_sequence(node: Node, x: Tensor, lengths: Tensor) -> Tensor:
    """The first so many steps of each sample turned around."""
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    steps = torch.arange(x.shape[time], device=x.device)
    ends = lengths.unsqueeze(1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    shape = [1] * x.ndim
    shape[batch], shape[time] = x.shape[batch], x.shape[time]
    places = places if batch < time else places.t()
    return torch.gather(x, time, places.reshape(shape).expand(x.shape))


@operator("Compress", since=9, static=(1,))
def compress(node: Node, x: Tensor, condition: Value) -> Tensor:
    if isinstance(condition, Tensor):
        raise Counted(f"{node.title} of a condition that depends on pixels", node.called)
    picked = [i for i, wanted in enumerate(condition.reshape(-1).tolist()) if wanted]
    axis = node.get("axis")
    index = torch.tensor(picked, dtype=torch.int64, device=x.device)
    return x.reshape(-1).index_select(0, index) if axis is None else x.index_select(axis, index)
