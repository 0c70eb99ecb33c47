"""Convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from models.formats.onnx.operators.padding import pad, window
from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value, allocation, ints

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@operator("Conv")
def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Padding stays inside the convolution wherever both sides get the same."""
    w = window(node, weight.shape[2:], x.shape[2:])
    padding = w.begin
    if not w.symmetric:
        x, padding = pad(x, w.begin, w.end), (0,) * len(w.kernel)
    run = CONV[len(w.kernel)]
    return run(
        x, weight, bias, stride=w.stride, padding=padding, dilation=w.dilation, groups=node.get("group", 1)
    )


@operator("ConvTranspose")
def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Uneven padding, and an explicit output shape, crop the unpadded result."""
    sizes = tuple(x.shape[2:])
    w = window(node, weight.shape[2:], sizes)
    extra = tuple(node.get("output_padding") or (0,) * len(sizes))
    full = [(n - 1) * s + e + o for n, s, e, o in zip(sizes, w.stride, w.extent, extra, strict=True)]
    begin, end = w.begin, w.end
    mode = node.get("auto_pad", "NOTSET")
    wanted = node.get("output_shape")
    if wanted is None and mode.startswith("SAME"):
        wanted = [n * s for n, s in zip(sizes, w.stride, strict=True)]
    if wanted is not None:
        totals = [f - t for f, t in zip(full, wanted[-len(sizes) :], strict=True)]
        half, rest = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        begin, end = (half, rest) if mode == "SAME_UPPER" else (rest, half)
    run = _CONV_TRANSPOSE[len(sizes)]
    inside = begin if begin == end and min(begin) >= 0 else (0,) * len(sizes)
    y = run(
        x,
        weight,
        bias,
        stride=w.stride,
        padding=inside,
        output_padding=extra,
        groups=node.get("group", 1),
        dilation=w.dilation,
    )
    return y if begin == end == inside else pad(y, [-b for b in begin], [-e for e in end])


@operator("Col2Im", since=18, static=(1, 2))
def col2im(node: Node, x: Tensor, image: Value, block: Value) -> Tensor:
    """Overlapping blocks [batch, channels * block, blocks] summed into an image."""
    sizes, kernel = ints(image, "The image of Col2Im"), ints(block, "The block of Col2Im")
    allocation([x.shape[1], *sizes], node.called)
    w = window(node, kernel, sizes)
    if len(sizes) == 2 and w.symmetric:
        return F.fold(x, tuple(sizes), w.kernel, w.dilation, w.begin, w.stride)
    # Each entry of a block is a channel of its own, which a transposed convolution with a one puts into its place.
    area = math.prod(kernel)
    channels = x.shape[1] // area
    full = [n + b + e for n, b, e in zip(sizes, w.begin, w.end, strict=True)]
    counts = [(n - e) // s + 1 for n, e, s in zip(full, w.extent, w.stride, strict=True)]
    extra = [n - (c - 1) * s - e for n, c, s, e in zip(full, counts, w.stride, w.extent, strict=True)]
    ones = (
        torch.eye(area, dtype=x.dtype, device=x.device)
        .reshape(area, 1, *kernel)
        .repeat(channels, 1, *[1] * len(kernel))
    )
    y = _CONV_TRANSPOSE[len(kernel)](
        x.reshape(x.shape[0], channels * area, *counts),
        ones,
        stride=w.stride,
        groups=channels,
        dilation=w.dilation,
    )
    return pad(y, [-b for b in w.begin], [o - e for o, e in zip(extra, w.end, strict=True)])
