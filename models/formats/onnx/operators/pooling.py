"""Pools, local and global."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.errors import UnsupportedOperator
from models.formats.onnx.operators.padding import Window, pad, window
from models.formats.onnx.registry import Node, operator

_MAX: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
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
def max_pool(node: Node, x: Tensor) -> Tensor:
    if len(node.outputs) > 1 and node.outputs[1]:
        raise UnsupportedOperator(f"{node.title} with indices", node.layer)
    w = window(node, node.get("kernel_shape"), x.shape[2:])
    ceil, padding = bool(node.get("ceil_mode", 0)), w.begin
    if not _half_fits(w):
        w = _covered(w, tuple(x.shape[2:]), ceil)
        x, ceil, padding = pad(x, w.begin, w.end, -math.inf), False, (0,) * len(w.kernel)
    return _MAX[len(w.kernel)](x, w.kernel, w.stride, padding, w.dilation, ceil)


@operator("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    sizes = tuple(x.shape[2:])
    w = window(node, node.get("kernel_shape"), sizes)
    if any(d != 1 for d in w.dilation):
        raise UnsupportedOperator(f"{node.title} with dilation", node.layer)
    run, ceil, counted = (
        _AVERAGE[len(w.kernel)],
        bool(node.get("ceil_mode", 0)),
        bool(node.get("count_include_pad", 0)),
    )
    if _half_fits(w):
        return run(x, w.kernel, w.stride, w.begin, ceil, counted)
    # The share of counted pixels under each window corrects the plain mean over it.
    inside = torch.ones((1, 1, *sizes), dtype=x.dtype, device=x.device)
    over = _covered(w, sizes, ceil)
    if counted:
        inside = pad(inside, w.begin, w.end, 1.0)
        share = pad(inside, (0,) * len(sizes), [o - e for o, e in zip(over.end, w.end, strict=True)])
    else:
        share = pad(inside, over.begin, over.end)
    y = run(pad(x, over.begin, over.end), w.kernel, w.stride)
    uneven = not counted or any(o > e for o, e in zip(over.end, w.end, strict=True))
    return y / run(share, w.kernel, w.stride) if uneven else y


@operator("LpPool")
def lp_pool(node: Node, x: Tensor) -> Tensor:
    w = window(node, node.get("kernel_shape"), x.shape[2:])
    p, area = node.get("p", 2), math.prod(w.kernel)
    if any(d != 1 for d in w.dilation):
        raise UnsupportedOperator(f"{node.title} with dilation", node.layer)
    over = _covered(w, tuple(x.shape[2:]), bool(node.get("ceil_mode", 0)))
    powers = _AVERAGE[len(w.kernel)](pad(x.abs().pow(p), over.begin, over.end), w.kernel, w.stride)
    return (powers * area).pow(1 / p)


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    return _GLOBAL[x.ndim - 2](x, 1)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, x: Tensor) -> Tensor:
    return _GLOBAL_MAX[x.ndim - 2](x, 1)


@operator("GlobalLpPool")
def global_lp_pool(node: Node, x: Tensor) -> Tensor:
    p = node.get("p", 2)
    return x.abs().pow(p).sum(tuple(range(2, x.ndim)), keepdim=True).pow(1 / p)
