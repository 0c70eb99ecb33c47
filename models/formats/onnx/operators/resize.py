"""Resizing of images and feature maps: torch's own kernels where they compute the same, else a matrix per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import SymInt, Tensor
from torch.nn import functional as F

from fusion.errors import UnsupportedOperator
from models.formats.onnx.operators.interpolation import Axis, matrix, nearest, outside
from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value, allocation, ints

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_CROPPING = "tf_crop_and_resize"


@operator("Upsample", since=7)
def upsample_7(node: Node, x: Tensor) -> Tensor:
    return _resize(node, x, _by_scales(node, x, range(x.ndim), node.get("scales")), "asymmetric", "floor")


@operator("Upsample", since=9, static=(1,))
@operator("Resize", since=10, static=(1,))
def upsample_9(node: Node, x: Tensor, scales: Value) -> Tensor:
    axes = _by_scales(node, x, range(x.ndim), _floats(node, scales))
    return _resize(node, x, axes, "asymmetric", "floor")


@operator("Resize", since=11, static=(1, 2, 3))
def resize(
    node: Node, x: Tensor, roi: Value | None = None, scales: Value | None = None, sizes: Value | None = None
) -> Tensor:
    where = [a % x.ndim for a in node.get("axes") or range(x.ndim)]
    if sizes is not None and not (not isinstance(sizes, Tensor) and sizes.size == 0):
        axes = _by_sizes(node, x, where, ints(sizes, "The sizes of Resize"))
    else:
        assert scales is not None
        axes = _by_scales(node, x, where, _floats(node, scales))
    mode = node.get("coordinate_transformation_mode", "half_pixel")
    if mode == _CROPPING:
        assert roi is not None
        corners = _floats(node, roi)
        for i, axis in enumerate(where):
            resized = axes.get(axis, Axis(x.shape[axis], x.shape[axis], 1.0))
            start, end = corners[i], corners[i + len(where)]
            if (start, end) != (0.0, 1.0) or axis in axes:
                axes[axis] = replace(resized, start=start, end=end)
    return _resize(node, x, axes, mode, node.get("nearest_mode", "round_prefer_floor"))


def _floats(node: Node, given: Value) -> list[float]:
    if isinstance(given, Tensor):
        raise UnsupportedOperator(f"{node.title} with scales that depend on pixels", node.called)
    return [float(s) for s in given.reshape(-1).tolist()]


def _by_scales(node: Node, x: Tensor, axes: Sequence[int], scales: Sequence[float]) -> dict[int, Axis]:
    """The axes that a file resizes by factors."""
    return {
        axis: _axis(node, x, axis, math.floor(x.shape[axis] * scale), scale)
        for axis, scale in zip(axes, scales, strict=True)
        if scale != 1
    }


def _by_sizes(node: Node, x: Tensor, axes: Sequence[int], sizes: Sequence[Any]) -> dict[int, Axis]:
    """The axes that a file resizes to sizes, or so far that the aspect ratio stays."""
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        wanted = {a: n for a, n in zip(axes, sizes, strict=True) if _differs(x.shape[a], n)}
        return {a: _axis(node, x, a, n, n / x.shape[a]) for a, n in wanted.items()}
    pick = min if policy == "not_larger" else max
    scale = pick(n / x.shape[a] for a, n in zip(axes, sizes, strict=True))
    return {a: _axis(node, x, a, math.floor(scale * x.shape[a] + 0.5), scale) for a in axes}


def _differs(size: Any, wanted: Any) -> bool:
    # The batch, which a file may fix, is never resized.
    return not isinstance(size, SymInt) and (isinstance(wanted, SymInt) or size != wanted)


def _axis(node: Node, x: Tensor, axis: int, after: Any, scale: float) -> Axis:
    if isinstance(x.shape[axis], SymInt) or isinstance(after, SymInt):
        raise UnsupportedOperator(f"{node.title} of the batch", node.called)
    return Axis(int(x.shape[axis]), int(after), scale)


def _resize(node: Node, x: Tensor, axes: dict[int, Axis], coordinates: str, rounding: str) -> Tensor:
    axes = {i: a for i, a in axes.items() if a.after != a.before or a.scale != 1 or coordinates == _CROPPING}
    allocation([axes[i].after if i in axes else n for i, n in enumerate(x.shape)], node.called)
    if not axes:
        return x
    spatial = x.ndim > 2 and min(axes) > 1
    sizes = [axes[i].after if i in axes else x.shape[i] for i in range(2, x.ndim)]
    if node.get("mode", "nearest") == "nearest":
        y = _nearest(x, axes, coordinates, rounding, sizes if spatial else None)
    else:
        own = _own_kernel(node, axes, coordinates, x.ndim - 2) if spatial else None
        y = x
        if own is not None:
            return F.interpolate(y, size=sizes, mode=own, align_corners=coordinates == "align_corners")
        for i, axis in axes.items():
            y = _applied(y, i, _weights(node, axis, coordinates))
    return _extrapolated(node, y, axes) if coordinates == _CROPPING else y


def _nearest(
    x: Tensor, axes: dict[int, Axis], coordinates: str, rounding: str, sizes: Sequence[int] | None
) -> Tensor:
    """torch's own kernel where it picks the same pixels, else one index_select per axis."""
    picks = {i: nearest(axis, coordinates, rounding) for i, axis in axes.items()}
    same = all(
        pick == [k * axes[i].before // len(pick) for k in range(len(pick))] for i, pick in picks.items()
    )
    if same and sizes is not None and x.is_floating_point() and len(sizes) <= 3:
        return F.interpolate(x, size=list(sizes), mode="nearest")
    for i, pick in picks.items():
        x = x.index_select(i, torch.tensor(pick, dtype=torch.int64, device=x.device))
    return x


def _own_kernel(node: Node, axes: dict[int, Axis], coordinates: str, rank: int) -> str | None:
    """The mode of torch's interpolation over `rank` dimensions that computes the same, or None."""
    mode = node.get("mode", "nearest")
    # With one output pixel, pytorch_half_pixel differs from half_pixel; torch itself does the latter.
    exact = all(math.isclose(a.after / a.before, a.scale, rel_tol=1e-6) for a in axes.values())
    half = coordinates == "half_pixel" or (
        coordinates == "pytorch_half_pixel" and min(a.after for a in axes.values()) > 1
    )
    plain = not node.get("antialias", 0) and not node.get("exclude_outside", 0)
    if not (exact and plain and (half or coordinates == "align_corners")):
        return None
    if mode == "cubic":
        own = rank == 2 and math.isclose(node.get("cubic_coeff_a", -0.75), -0.75)
        return "bicubic" if own else None
    return _LINEAR.get(rank)


def _weights(node: Node, axis: Axis, coordinates: str) -> Tensor:
    try:
        weights = matrix(
            axis,
            coordinates,
            node.get("mode", "nearest"),
            node.get("cubic_coeff_a", -0.75),
            bool(node.get("antialias", 0)),
            bool(node.get("exclude_outside", 0)),
        )
    except UnsupportedOperator as error:
        raise UnsupportedOperator(error.op, node.called) from None
    return torch.tensor(weights)


def _applied(x: Tensor, axis: int, weights: Tensor) -> Tensor:
    """A matrix [after, before] along one axis."""
    weights = weights.to(x.device)
    if axis == x.ndim - 2:
        return torch.matmul(weights, x)
    if axis == x.ndim - 1:
        return torch.matmul(x, weights.t())
    return torch.matmul(x.movedim(axis, -1), weights.t()).movedim(-1, axis)


def _extrapolated(node: Node, y: Tensor, axes: dict[int, Axis]) -> Tensor:
    """What comes from beyond the input takes a fixed value."""
    beyond: Any = False
    for i, axis in axes.items():
        shape = [axis.after if k == i else 1 for k in range(y.ndim)]
        beyond = beyond | outside(axis, _CROPPING).reshape(shape)
    if not np.any(beyond):
        return y
    value = torch.tensor(node.get("extrapolation_value", 0.0), dtype=y.dtype, device=y.device)
    return torch.where(torch.tensor(beyond, device=y.device), value, y)
