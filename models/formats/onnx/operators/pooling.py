"""Pools, local and global."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.formats.onnx.operators.convolution import CONV
from models.formats.onnx.operators.padding import Window, dimensions, pad, window
from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value, allocation, ints

_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_GLOBAL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
_GLOBAL_MAX: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


def _half_fits(w: Window) -> bool:
    """Whether torch's pools can do the padding themselves: the same on both sides, at most half a kernel."""
    return w.symmetric and all(2 * b <= k for b, k in zip(w.begin, w.kernel, strict=True))


def _covered(w: Window, sizes: tuple[int, ...], ceil: bool) -> Window:
    """The window with its end padding moved to where the last window ends."""
    ends = []
    for n, e, s, b, p in zip(sizes, w.extent, w.stride, w.begin, w.end, strict=True):
        count = (math.ceil if ceil else math.floor)((n + b + p - e) / s) + 1
        if ceil and (count - 1) * s >= n + b:
            count -= 1  # a window must start inside the input or its left padding
        ends.append((count - 1) * s + e - n - b)
    return replace(w, end=tuple(ends))


@operator("MaxPool")
def max_pool(node: Node, x: Tensor) -> Any:
    """Where the largest lie is a second output, counted over the whole input (columns first, with `storage_order`)."""
    w = window(node, node.get("kernel_shape"), x.shape[2:])
    ceil = bool(node.get("ceil_mode", 0))
    padded, inside = x, w
    if not _half_fits(w):
        w = _covered(w, tuple(x.shape[2:]), ceil)
        least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        padded = pad(x, w.begin, w.end, least)
        inside, ceil = replace(w, begin=(0,) * len(w.kernel)), False
    settings = (padded, inside.kernel, inside.stride, inside.begin, inside.dilation, ceil)
    y = _MAX[len(w.kernel)](*settings)
    if len(node.outputs) < 2 or not node.outputs[1]:
        return y
    places = _MAX[len(w.kernel)](*settings, return_indices=True)[1]
    shift = (0,) * len(w.kernel) if inside is w else w.begin
    return y, _counted(places, tuple(padded.shape[2:]), shift, x, bool(node.get("storage_order", 0)))


def _counted(
    places: Tensor, sizes: tuple[int, ...], shift: tuple[int, ...], x: Tensor, columns_first: bool
) -> Tensor:
    """Indices into one padded plane [..., *sizes] as indices into all of x, `shift` being the padding."""
    spatial = tuple(x.shape[2:])
    coordinates: list[Tensor] = []
    for size, before in zip(reversed(sizes), reversed(shift), strict=True):
        coordinates.insert(0, places % size - before)
        places = torch.div(places, size, rounding_mode="floor")
    order = range(len(spatial) - 1, -1, -1) if columns_first else range(len(spatial))
    flat = torch.zeros_like(places)
    for axis in order:
        flat = flat * spatial[axis] + coordinates[axis]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    return flat + math.prod(spatial) * planes.reshape(x.shape[0], x.shape[1], *[1] * len(spatial))


@operator("MaxUnpool", since=9, static=(2,))
def max_unpool(node: Node, x: Tensor, places: Tensor, target: Value | None = None) -> Tensor:
    """Each value back to the place that its index names in the output, zeros elsewhere (as ONNX Runtime has it)."""
    if target is None:
        kernel = node.get("kernel_shape")
        w = window(node, kernel, x.shape[2:])
        spatial = [
            (n - 1) * s + k - b - e
            for n, s, k, b, e in zip(x.shape[2:], w.stride, kernel, w.begin, w.end, strict=True)
        ]
    else:
        spatial = ints(target, "The size of MaxUnpool")[2:]
    allocation([*x.shape[:2], *spatial], node.called)
    each = x.shape[1] * math.prod(spatial)
    samples = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    own = places.reshape(x.shape[0], -1) - each * samples
    blank = torch.zeros((x.shape[0], each), dtype=x.dtype, device=x.device)
    filled = torch.scatter(blank, 1, own, x.reshape(x.shape[0], -1))
    return filled.reshape(x.shape[0], x.shape[1], *spatial)


@operator("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    sizes = tuple(x.shape[2:])
    w = window(node, node.get("kernel_shape"), sizes)
    ceil, counted = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    if _half_fits(w) and not _dilated(w):
        return _AVERAGE[len(w.kernel)](x, w.kernel, w.stride, w.begin, ceil, counted)
    # The share of counted pixels under each window corrects the plain mean over it.
    inside = torch.ones((1, 1, *sizes), dtype=x.dtype, device=x.device)
    over = _covered(w, sizes, ceil)
    if counted:
        inside = pad(inside, w.begin, w.end, 1.0)
        share = pad(inside, (0,) * len(sizes), [o - e for o, e in zip(over.end, w.end, strict=True)])
    else:
        share = pad(inside, over.begin, over.end)
    y = _mean(pad(x, over.begin, over.end), w)
    uneven = not counted or any(o > e for o, e in zip(over.end, w.end, strict=True))
    return y / _mean(share, w) if uneven else y


def _dilated(w: Window) -> bool:
    return any(d != 1 for d in w.dilation)


def _mean(x: Tensor, w: Window) -> Tensor:
    """The mean under each window of a padded x; with gaps in the window, as a depthwise convolution."""
    if not _dilated(w):
        return _AVERAGE[len(w.kernel)](x, w.kernel, w.stride)
    area = math.prod(w.kernel)
    kernel = torch.full((x.shape[1], 1, *w.kernel), 1 / area, dtype=x.dtype, device=x.device)
    return CONV[len(w.kernel)](x, kernel, stride=w.stride, dilation=w.dilation, groups=x.shape[1])


@operator("LpPool")
def lp_pool(node: Node, x: Tensor) -> Tensor:
    w = window(node, node.get("kernel_shape"), x.shape[2:])
    p, area = node.get("p", 2), math.prod(w.kernel)
    over = _covered(w, tuple(x.shape[2:]), bool(node.get("ceil_mode", 0)))
    powers = _mean(pad(x.abs().pow(p), over.begin, over.end), w)
    return (powers * area).pow(1 / p)


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    return _GLOBAL[dimensions(node, x)](x, 1)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, x: Tensor) -> Tensor:
    return _GLOBAL_MAX[dimensions(node, x)](x, 1)


@operator("GlobalLpPool")
def global_lp_pool(node: Node, x: Tensor) -> Tensor:
    p = node.get("p", 2)
    return x.abs().pow(p).sum(tuple(range(2, x.ndim)), keepdim=True).pow(1 / p)
