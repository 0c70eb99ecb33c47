"""Tensors from nothing, or from a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion.errors import UnsupportedOperator
from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value, allocation, dtype, ints, scalar


@operator("Constant")
def constant(node: Node) -> Tensor:
    known: dict[str, Callable[[Any], Tensor]] = {
        "value": torch.from_numpy,
        "value_float": lambda v: torch.tensor(v, dtype=torch.float32),
        "value_floats": lambda v: torch.tensor(v, dtype=torch.float32),
        "value_int": lambda v: torch.tensor(v, dtype=torch.int64),
        "value_ints": lambda v: torch.tensor(v, dtype=torch.int64),
    }
    for attribute, make in known.items():
        if attribute in node.attributes:
            tensor: Tensor = make(node.get(attribute))
            return tensor
    raise UnsupportedOperator(f"{node.title} of strings or sparse values", node.called)


@operator("ConstantOfShape", since=9, static=(0,))
def constant_of_shape(node: Node, shape: Value) -> Tensor:
    value = node.get("value")
    fill = np.zeros(1, np.float32) if value is None else value.reshape(-1)
    sizes = allocation(ints(shape, "The shape of ConstantOfShape"), node.called)
    return torch.full(tuple(sizes), fill[0].item(), dtype=torch.from_numpy(fill).dtype)


@operator("Range", since=11, static=(0, 1, 2))
def range_(node: Node, start: Value, limit: Value, delta: Value) -> Tensor:
    first, last, step = (scalar(v, "The bounds of Range") for v in (start, limit, delta))
    if isinstance(first, int | float) and isinstance(last, int | float) and step:
        allocation([max(int((last - first) / step), 0)], node.called)
    kind = torch.float32 if any(isinstance(v, float) for v in (first, last, step)) else torch.int64
    if isinstance(start, np.ndarray) and start.dtype in (np.int16, np.int32):
        kind = torch.from_numpy(start).dtype
    return torch.arange(first, last, step, dtype=kind)


@operator("EyeLike", since=9)
def eye_like(node: Node, x: Tensor) -> Tensor:
    kind = dtype(node.get("dtype")) if node.get("dtype") else x.dtype
    row = torch.arange(x.shape[0]).unsqueeze(1) + node.get("k", 0)
    return torch.eq(row, torch.arange(x.shape[1])).to(kind)


@operator("OneHot", since=9, static=(1,))
def one_hot(node: Node, indices: Tensor, depth: Value, values: Tensor) -> Tensor:
    count, axis = int(scalar(depth, "The depth of OneHot")), node.get("axis", -1)
    allocation([*indices.shape, count], node.called)
    wrapped = torch.where(indices < 0, indices + count, indices).to(torch.int64)
    hot = wrapped.unsqueeze(-1) == torch.arange(count)
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)
