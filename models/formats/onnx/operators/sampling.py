"""Values read between pixels: grids, regions of interest, and convolutions whose kernels reach where they are told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.errors import UnsupportedOperator
from models.formats.onnx.operators.padding import window
from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value, allocation

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def _per_sample(x: Tensor, given: Tensor) -> Tensor:
    """What was made for a batch of one, for every sample of x."""
    one = isinstance(given.shape[0], int) and given.shape[0] == 1
    return given.expand(x.shape[0], *given.shape[1:]) if one else given


@operator("GridSample", since=16)
def grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    mode = node.get("mode", "linear" if node.opset >= 20 else "bilinear")
    return F.grid_sample(
        x,
        _per_sample(x, grid),
        _MODES.get(mode, mode),
        node.get("padding_mode", "zeros"),
        bool(node.get("align_corners", 0)),
    )


@operator("RoiAlign", since=10, static=(1,))
def roi_align(node: Node, x: Tensor, rois: Value, batch: Tensor) -> Tensor:
    """Each region [K, (x, y, x, y)] of its sample in bins [K, C, height, width]: of points read bilinearly in each, the
    mean or the maximum.

    Bilinear reading is a product with a matrix per axis, so the mean is Y X Zᵀ with matrices that average.
    """
    default = "half_pixel" if node.opset >= 16 else "output_half_pixel"
    aligned = node.get("coordinate_transformation_mode", default) == "half_pixel"
    boxes = torch.from_numpy(rois) if isinstance(rois, np.ndarray) else rois
    corners = boxes * node.get("spatial_scale", 1.0) - (0.5 if aligned else 0.0)
    start, size = corners[:, :2], corners[:, 2:] - corners[:, :2]
    size = size if aligned else size.clamp_min(1.0)
    bins = (node.get("output_width", 1), node.get("output_height", 1))
    allocation([boxes.shape[0], x.shape[1], *bins], node.called)
    points, largest = node.get("sampling_ratio", 0), node.get("mode", "avg") == "max"
    if not points and (isinstance(rois, Tensor) or largest):
        raise UnsupportedOperator(
            f"{node.title} with a number of points that depends on its boxes",
            node.called,
            "Give a sampling_ratio.",
        )
    if largest:
        return _largest(x[batch], start, size, bins, points)
    weights = []
    for i in range(2):
        counts = [points] * boxes.shape[0]
        if not points and isinstance(rois, np.ndarray):  # one for each pixel of a bin
            sizes = (rois[:, 2 + i] - rois[:, i]) * np.float32(node.get("spatial_scale", 1.0))
            sizes = sizes if aligned else np.maximum(sizes, 1)
            counts = [max(math.ceil(s / bins[i]), 1) for s in sizes.tolist()]
        weights.append(_averaging(start[:, i], size[:, i], bins[i], counts, x.shape[3 - i]))
    across, down = weights
    return torch.matmul(torch.matmul(down.unsqueeze(1), x[batch]), across.transpose(1, 2).unsqueeze(1))


@operator("MaxRoiPool")
def max_roi_pool(node: Node, x: Tensor, rois: Tensor) -> Tensor:
    """Each region [K, (sample, x, y, x, y)], rounded to pixels, in bins [K, C, height, width] that share their borders:
    the largest of each, 0 of an empty one."""
    height, width = node.get("pooled_shape")
    allocation([rois.shape[0], x.shape[1], height * width, x.shape[3]], node.called)
    corners = torch.floor(rois[:, 1:] * node.get("spatial_scale", 1.0) + 0.5)
    across = _covered(corners[:, 0], corners[:, 2], width, x.shape[3])
    down = _covered(corners[:, 1], corners[:, 3], height, x.shape[2])
    least = torch.full((), -math.inf, dtype=x.dtype, device=x.device)
    y = x[rois[:, 0].to(torch.int64)]
    y = torch.where(across[:, None, None], y.unsqueeze(3), least).amax(4)
    y = torch.where(down[:, None, :, :, None], y.unsqueeze(2), least).amax(3)
    return torch.where(torch.isinf(y), torch.zeros_like(y), y)


def _covered(start: Tensor, end: Tensor, bins: int, size: Any) -> Tensor:
    """Which of so many pixels each bin of each region covers, [K, bins, size]."""
    each = (end - start + 1).clamp_min(1).unsqueeze(1) / bins
    number = torch.arange(bins, device=start.device)
    first = (torch.floor(number * each) + start.unsqueeze(1)).unsqueeze(2)
    last = (torch.ceil((number + 1) * each) + start.unsqueeze(1)).unsqueeze(2)
    pixel = torch.arange(size, device=start.device)
    return torch.logical_and(pixel >= first, pixel < last)


def _places(start: Tensor, size: Tensor, bins: int, points: int) -> Tensor:
    """The coordinates [K, bins * points] of evenly spaced points in each bin."""
    offsets = (torch.arange(bins * points, device=start.device) + 0.5) / points
    return start.unsqueeze(1) + offsets * (size / bins).unsqueeze(1)


def _reading(places: Tensor, length: int) -> Tensor:
    """Weights [..., length] that read a row at these places: the edge up to a pixel beyond it, nothing further out."""
    inside = (places >= -1) & (places <= length)
    held = places.clamp(0, length - 1).unsqueeze(-1)
    tent = (1 - (held - torch.arange(length, device=places.device)).abs()).clamp_min(0)
    return tent * inside.unsqueeze(-1)


def _averaging(start: Tensor, size: Tensor, bins: int, points: Sequence[int], length: int) -> Tensor:
    """Weights [K, bins, length] of the mean of each bin's points, as many as `points` says of each region."""
    if len(set(points)) == 1:
        weights = _reading(_places(start, size, bins, points[0]), length)
        return weights.reshape(-1, bins, points[0], length).mean(2)
    rows = [_averaging(start[k : k + 1], size[k : k + 1], bins, [n], length) for k, n in enumerate(points)]
    return torch.cat(rows)


def _largest(x: Tensor, start: Tensor, size: Tensor, bins: tuple[int, int], points: int) -> Tensor:
    """The largest of the weighted pixels around each point of a bin, as the standard defines the maximum."""
    length = (x.shape[3], x.shape[2])
    places = [_places(start[:, i], size[:, i], bins[i], points) for i in range(2)]
    inside = [(p >= -1) & (p <= n) for p, n in zip(places, length, strict=True)]
    held = [p.clamp(0, n - 1) for p, n in zip(places, length, strict=True)]
    corners = []
    for shift_y in (0, 1):
        for shift_x in (0, 1):
            picks, shares = [], []
            for p, n, shift in zip(held, length, (shift_x, shift_y), strict=True):
                low = p.floor()
                picks.append((low + shift).clamp_max(n - 1).to(torch.int64))
                shares.append(p - low if shift else 1 - (p - low))
            rows = torch.arange(x.shape[0], device=x.device).reshape(-1, 1, 1)
            values = x.permute(0, 2, 3, 1)[rows, picks[1].unsqueeze(2), picks[0].unsqueeze(1)]
            share = shares[1].unsqueeze(2) * shares[0].unsqueeze(1)
            share = share * (inside[1].unsqueeze(2) & inside[0].unsqueeze(1))
            corners.append(values * share.unsqueeze(-1))
    best = torch.stack(corners).amax(0)  # [K, height * points, width * points, C]
    best = best.reshape(x.shape[0], bins[1], points, bins[0], points, x.shape[1]).amax((2, 4))
    return best.permute(0, 3, 1, 2)


@operator("DeformConv", since=19)
def deform_conv(
    node: Node,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A convolution whose kernel reads x at its usual places plus offsets (Dai et al. 2017), each times a mask (Zhu et
    al. 2019): the places are read as a grid, and what was read is multiplied by the kernel."""
    if x.ndim != 4:
        raise UnsupportedOperator(f"{node.title} in {x.ndim - 2} dimensions", node.called)
    w = window(node, weight.shape[2:], x.shape[2:])
    groups, parts = node.get("group", 1), node.get("offset_group", 1)
    batch, channels, height, width = x.shape
    rows, columns = offset.shape[2:]
    taps = math.prod(w.kernel)
    offset = _per_sample(x, offset).reshape(batch * parts, taps, 2, rows, columns)
    places = []
    for i, (count, extent) in enumerate(((rows, height), (columns, width))):
        steps = torch.arange(count, device=x.device) * w.stride[i] - w.begin[i]
        kernel = torch.arange(w.kernel[i], device=x.device) * w.dilation[i]
        kernel = kernel.repeat_interleave(w.kernel[1]) if i == 0 else kernel.repeat(w.kernel[0])
        usual = kernel.reshape(-1, 1, 1) + (steps.reshape(-1, 1) if i == 0 else steps.reshape(1, -1))
        # From pixels to the grid's -1 to 1 between the centres of the outermost.
        places.append((offset[:, :, i] + usual) * (2 / max(extent - 1, 1)) - 1)
    grid = torch.stack(places[::-1], -1).reshape(batch * parts, taps * rows, columns, 2)
    source = x.reshape(batch * parts, channels // parts, height, width)
    read = F.grid_sample(source, grid, "bilinear", "zeros", align_corners=True)
    read = read.reshape(batch, parts, channels // parts, taps, rows, columns)
    if mask is not None:
        read = read * _per_sample(x, mask).reshape(batch, parts, 1, taps, rows, columns)
    read = read.reshape(batch, channels * taps, rows, columns)
    kernel = weight.reshape(weight.shape[0], weight.shape[1] * taps, 1, 1)
    return F.conv2d(read, kernel, bias, groups=groups)
