"""Picking and placing elements by index."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.errors import UnsupportedOperator
from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value


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
    if node.get("batch_dims", 0):
        raise UnsupportedOperator(f"{node.title} with batch_dims", node.layer)
    return x[tuple(indices.unbind(-1))]


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
    if how not in ("none", "add"):
        raise UnsupportedOperator(f"{node.title} with reduction {how}", node.layer)
    return torch.index_put(x, tuple(indices.unbind(-1)), updates, accumulate=how == "add")
