"""Operators that return as much as the values say: on constants only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Numbers, Value, scalar


@operator("NonZero", since=9, counting=True)
def non_zero(node: Node, x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


@operator("Unique", since=11, static=(0,), counting=True)
def unique(node: Node, x: Numbers) -> tuple[Tensor, ...]:
    """The values, where each comes first, which each element is, and how often each occurs."""
    axis = node.get("axis")
    values, first, inverse, counts = np.unique(
        x, return_index=True, return_inverse=True, return_counts=True, axis=axis
    )
    inverse = inverse.reshape(-1)
    if not node.get("sorted", 1):
        order = np.argsort(first)
        rank = np.argsort(order)
        values = np.take(values, order, axis=axis or 0)
        first, counts, inverse = first[order], counts[order], rank[inverse]
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in (values, first, inverse, counts))


@operator("NonMaxSuppression", since=10, static=(2, 3, 4), counting=True)
def non_max_suppression(
    node: Node,
    boxes: Tensor,
    scores: Tensor,
    most: Value | None = None,
    overlap: Value | None = None,
    least: Value | None = None,
) -> Tensor:
    """(sample, class, box) of the boxes that are kept, [K, 3]: per class the best first, none that overlaps a better
    one by more than the threshold (intersection over union). boxes [N, B, 4], scores [N, C, B]."""
    limit = 0 if most is None else int(scalar(most, "The number of boxes"))
    threshold = 0.0 if overlap is None else float(scalar(overlap, "The overlap of boxes"))
    floor = None if least is None else float(scalar(least, "The least score"))
    corners = _corners(boxes, bool(node.get("center_point_box", 0)))
    kept: list[tuple[int, int, int]] = []
    for sample, of_sample in enumerate(scores):
        for label, of_class in enumerate(of_sample):
            chosen: list[int] = []
            for box in torch.argsort(of_class, descending=True, stable=True).tolist():
                if len(chosen) >= limit or (floor is not None and of_class[box] <= floor):
                    break
                if all(_overlap(corners[sample, box], corners[sample, c]) <= threshold for c in chosen):
                    chosen.append(box)
            kept += [(sample, label, box) for box in chosen]
    return torch.tensor(kept, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, by_center: bool) -> Tensor:
    """Boxes as (low, low, high, high), whichever corners they are given by."""
    if by_center:
        middle, half = boxes[..., :2], boxes[..., 2:] / 2
        return torch.cat([middle - half, middle + half], -1)
    a, b = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)


def _overlap(a: Any, b: Any) -> float:
    """Intersection over union."""
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0)
    both = float(sides.prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - both
    return both / union if union > 0 else 0.0
